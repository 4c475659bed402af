"""What changes in the base after an adapter was put on it is not lost: it is written with the adapter, or a
warning names it."""

import copy
import pickle
import warnings

import pytest
import torch
from adapted import close, output, put
from models import FAMILIES
from torch import nn

import lortalib

IDS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}


@pytest.fixture
def model():
    return FAMILIES["Llama"].model("ForCausalLM")


def resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 3)


def write(model):
    with torch.no_grad():
        model.model.norm.weight.add_(1)


def load(model):
    state = {name: 2 * t for name, t in model.state_dict().items() if "mlp.up_proj" in name}
    model.load_state_dict(state, strict=False)


def replace(model):
    model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    model.lm_head.requires_grad_(False)


def add(model):
    model.model.register_buffer("shift", torch.ones(3))


def train(model):
    norm = model.model.norm.requires_grad_(True)
    model(**IDS)[0].square().mean().backward()
    torch.optim.SGD(norm.parameters(), lr=0.1).step()
    norm.requires_grad_(False)


def leave_in(model):
    put(model, "lora", name="other", seed=3).remove(merged=True)


def leave_head_in(model):
    other = put(model, "lora", name="other", seed=3, train_also=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    other.remove(merged=True)


def again(model):
    """Write the numbers of the base again, as DDP does with those of its first process."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    model.load_state_dict(model.state_dict())


def rows(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1


def inside(model):
    with torch.no_grad():
        model.lm_head.weight[1:, 1:] += 1


CHANGES = (resize, write, load, train, leave_in, leave_head_in, rows, inside)
UNCHANGED = {
    "nothing": lambda model, one: None,
    "a dtype": lambda model, one: model.double().float(),
    "another dtype": lambda model, one: again(model.bfloat16()),
    "the same numbers": lambda model, one: again(model),
    "tensors that a tool replaced": lambda model, one: replace_tensors(model),
    "merged and unmerged": lambda model, one: (one.merge(), one.unmerge()),
    "switched": lambda model, one: (one.disable(), one.enable()),
    "a head that trains": lambda model, one: head(model),
    "a head that came and went": lambda model, one: (head(model), head(model).remove()),
}


def replace_tensors(model):
    norm, before = model.model.norm, model.model.norm.weight
    norm.weight = nn.Parameter(torch.zeros_like(before), requires_grad=False)
    for _ in range(before._version + 1):  # more writes than the other had
        norm.weight.add_(1)


def head(model):
    found = lortalib.nn.adapters(model)
    if "head" in found:
        return found["head"]
    adapter = put(model, "lora", name="head", seed=4, train_also=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    return adapter


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


each_copy = pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, by_pickle])


@each_copy
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_saved_with_the_adapter(model, change, copied, tmp_path):
    put(model)
    change(model)
    model = copied(model)
    wanted = output(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, so nothing is said
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    lortalib.nn.load(again, tmp_path)
    assert close(output(again, IDS), wanted, 1e-6)


@pytest.mark.parametrize("change", [*CHANGES, replace, add])
def test_a_file_of_the_adapter_alone_says_what_it_lacks(model, change, tmp_path):
    adapter = put(model)
    change(model)
    name = {
        resize: "model.embed_tokens.weight", write: "model.norm.weight", train: "model.norm.weight",
        load: "mlp.up_proj.weight", replace: "lm_head.weight", add: "model.shift",
        leave_in: "q_proj.weight", leave_head_in: "q_proj.weight", rows: "embed_tokens.weight",
        inside: "lm_head.weight",
    }[change]  # fmt: skip
    for save in (adapter.save, adapter.export_lora):
        with pytest.warns(UserWarning, match=rf"has changed since .*{name}"):
            save(tmp_path / save.__name__)


@pytest.mark.parametrize(("number", "more"), [(1, ""), (3, ""), (4, " and 1 more")])
def test_a_warning_names_three_and_counts_the_others(model, number, more, tmp_path):
    adapter = put(model)
    with torch.no_grad():
        for parameter in [p for n, p in model.named_parameters() if "lortalib" not in n][:number]:
            parameter.add_(1)
    names = ", ".join([r"[\w.]+"] * min(number, 3))
    with pytest.warns(UserWarning, match=rf"in {names}{more}, which no file"):
        adapter.save(tmp_path)


def made_in_inference_mode():
    with torch.inference_mode():
        return FAMILIES["Llama"].model("ForCausalLM")


def in_part_offloaded():
    model = FAMILIES["Llama"].model("ForCausalLM")
    model.model.norm.to("meta")
    return model


class Packed(torch.Tensor):
    """A tensor of another tool, which has no rows."""

    def __getitem__(self, place):
        raise TypeError


def packed():
    model = FAMILIES["Llama"].model("ForCausalLM")
    weight = model.model.norm.weight.detach().as_subclass(Packed)
    model.model.norm.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("base", [made_in_inference_mode, in_part_offloaded, packed])
def test_a_base_whose_writes_cannot_be_told_is_taken_as_it_is(base, tmp_path):
    model = base()
    adapter = put(model)
    with torch.inference_mode(base is made_in_inference_mode), torch.no_grad():
        model.model.norm.weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save(tmp_path)


def test_a_tensor_without_entries_is_no_change(model, tmp_path):
    model.model.register_buffer("nothing", torch.ones(0, 3))
    adapter = put(model)
    again(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save(tmp_path)


def test_a_file_for_llama_cpp_says_it_too(model, tmp_path):
    pytest.importorskip("gguf")
    adapter = put(model)
    write(model)
    with pytest.warns(UserWarning, match=r"has changed since .*model\.norm\.weight"):
        lortalib.nn.export_gguf(adapter, tmp_path / "lora.gguf")


@pytest.mark.parametrize("act", UNCHANGED.values(), ids=UNCHANGED)
def test_what_the_library_does_to_the_base_is_no_change(model, act, tmp_path):
    adapter = put(model)
    act(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save(tmp_path / "one")
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


@each_copy
def test_a_change_of_a_module_is_seen_again_when_an_adapter_that_trained_it_is_gone(
    model, copied, tmp_path
):
    put(model)
    with torch.no_grad():
        model.lm_head.weight.sub_(1)
    wanted = output(model, IDS)
    head(model)
    model = copied(model)
    found = lortalib.nn.adapters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found["head"].save(tmp_path / "head")  # which has its own lm_head
    found["head"].remove()
    assert close(output(model, IDS), wanted, 1e-6)
    with pytest.warns(UserWarning, match=r"in lm_head\.weight, which"):
        found["default"].save(tmp_path / "one")


def test_a_merged_update_is_no_change(model, tmp_path):
    adapter = put(model)
    adapter.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save(tmp_path)


def test_a_change_between_two_calls_of_the_library_is_seen(model, tmp_path):
    adapter = put(model)
    adapter.merge()
    write(model)
    adapter.unmerge()
    with pytest.warns(UserWarning, match=r"in model\.norm\.weight, which"):
        adapter.save(tmp_path)


def test_running_statistics_of_a_frozen_base_are_saved(tmp_path):
    """A frozen layer of batch norm goes on counting in a forward with train()."""
    model = FAMILIES["Llama"].model("ForCausalLM")
    model.model.norm = nn.Sequential(model.model.norm, Norm(16))
    adapter = put(model)
    model.train()
    model(**IDS)
    with pytest.warns(UserWarning, match=r"in model\.norm\.1\.norm\.num_batches_tracked"):
        adapter.save(tmp_path)


def test_statistics_of_a_trained_module_are_in_its_file_and_stay_where_it_is_left_in(tmp_path):
    model = FAMILIES["Llama"].model("ForCausalLM")
    model.model.norm = nn.Sequential(model.model.norm, Norm(16))
    one = put(model)
    two = put(model, "lora", name="two", targets="q", layers=0, train_also=["norm.1"])
    model.train()(**IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.save(tmp_path / "two")
    two.remove(merged=True)
    # Beside the weight of q: weight, bias and three numbers of the statistics.
    with pytest.warns(UserWarning, match=r"q_proj\.weight, .* and 3 more, which no file"):
        one.save(tmp_path / "one")


class Norm(nn.Module):
    """Batch norm over the features of the last axis."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).view(x.shape)
