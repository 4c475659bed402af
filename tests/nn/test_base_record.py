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


CHANGES = (resize, write, load, train, leave_in, leave_head_in, rows)
UNCHANGED = {
    "nothing": lambda model, one: None,
    "a dtype": lambda model, one: model.double().float(),
    "another dtype": lambda model, one: again(model.bfloat16()),
    "the same numbers": lambda model, one: again(model),
    "merged and unmerged": lambda model, one: (one.merge(), one.unmerge()),
    "switched": lambda model, one: (one.disable(), one.enable()),
    "a head that trains": lambda model, one: head(model),
    "a head that came and went": lambda model, one: (head(model), head(model).remove()),
}


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


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, by_pickle])
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
    }[change]  # fmt: skip
    for save in (adapter.save, adapter.export_lora):
        with pytest.warns(UserWarning, match=rf"has changed since .*{name}"):
            save(tmp_path / save.__name__)


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


class Norm(nn.Module):
    """Batch norm over the features of the last axis."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).view(x.shape)
