"""A model in wrappers, or with wrapped parts, is its plain model to every verb."""

import warnings

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from adapted import changes, close, output, picture, put, same_bits
from models import FAMILIES, words
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import lortalib

FAMILY = FAMILIES["Llama"]
INPUTS = words()


def base():
    return FAMILY.model("ForCausalLM")


def compiled(module):
    return torch.compile(module, backend="eager")


def with_body(wrap):
    def within(model):
        model.model = wrap(model.model)
        return model

    return within


def with_layers(wrap):
    def within(model):
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = wrap(layer)
        return model

    return within


def with_attention(wrap):
    def within(model):
        for layer in model.model.layers:
            layer.self_attn = wrap(layer.self_attn)
            layer.mlp = wrap(layer.mlp)
        return model

    return within


def with_projections(wrap):
    def within(model):
        for layer in model.model.layers:
            layer.self_attn.q_proj = wrap(layer.self_attn.q_proj)
        model.lm_head = wrap(model.lm_head)
        return model

    return within


def in_peft(model):
    """With a LoRA that changes nothing yet."""
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def in_ddp(model):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture(autouse=True)
def _no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


WHOLE = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": in_ddp,
    "compiled DDP": lambda model: compiled(in_ddp(model)),
    "PEFT": in_peft,
    "compiled PEFT": lambda model: compiled(in_peft(model)),
    "accelerate": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    "averaged": AveragedModel,
}
PARTS = {
    "compiled body": with_body(compiled),
    "compiled layers": with_layers(compiled),
    "compiled attention and MLP": with_attention(compiled),
    "compiled projections": with_projections(compiled),
    "checkpointed layers": with_layers(checkpoint_wrapper),
}
#: Compiled twice more in other pieces, by the same code.
SLOW = ("compiled body", "compiled attention and MLP")
each = pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, wrap in (WHOLE | PARTS).items()
    ],
)


def inner(wrapped):
    """The model that computes; the average has a copy of its own."""
    return next(iter(lortalib.nn.adapters(wrapped).values())).model


@each
@pytest.mark.filterwarnings("ignore:PEFT trains")
@pytest.mark.parametrize("options", [{}, {"targets": "all", "train_also": ["lm_head"]}], ids=str)
def test_names_are_those_of_the_plain_model(wrap, options, tmp_path):
    wrapped = wrap(base())
    adapter = put(wrapped, **options)
    assert lortalib.nn.adapters(wrapped) == {"default": adapter}
    assert lortalib.nn.adapters(adapter.model) == {"default": adapter}
    plain = base()
    twin = put(plain, **options)
    assert adapter.sites == twin.sites
    with torch.no_grad():
        for path in adapter.trained_modules.paths:
            for model in (adapter.model, plain):
                model.get_submodule(path).weight.add_(0.1)
    found = output(plain, INPUTS)
    assert close(output(adapter.model, INPUTS), found)
    own, theirs = adapter.save(tmp_path / "own"), twin.save(tmp_path / "theirs")
    assert (own / "adapter.safetensors").read_bytes() == (
        theirs / "adapter.safetensors"
    ).read_bytes()
    again = base()
    lortalib.nn.load(again, own)
    assert close(output(again, INPUTS), found)
    lora = peft.PeftModel.from_pretrained(base(), adapter.export_lora(tmp_path / "lora"))
    assert close(output(lora, INPUTS), found)
    adapter.merge()
    assert close(output(adapter.model, INPUTS), found)
    adapter.unmerge()
    with adapter.disabled():
        assert close(output(adapter.model, INPUTS), output(base(), INPUTS))


@each
@pytest.mark.filterwarnings("ignore:PEFT trains")
def test_a_wrapped_model_takes_what_was_saved(wrap, tmp_path):
    plain = base()
    put(plain, train_also=["lm_head"]).save(tmp_path / "own")
    put(base()).export_lora(tmp_path / "lora")
    wrapped = wrap(base())
    adapter = lortalib.nn.load(wrapped, tmp_path / "own")
    assert close(output(adapter.model, INPUTS), output(plain, INPUTS))
    adapter.remove()
    adapter = lortalib.nn.load_lora(wrapped, tmp_path / "lora")
    assert {site.path for site in adapter.sites} == {site.path for site in lortalib.nn.sites(plain)}


@pytest.mark.parametrize("wrap", PARTS.values(), ids=PARTS)
def test_parts_that_are_wrapped_later_keep_their_names_and_flags(wrap, tmp_path):
    model = base()
    model.model.embed_tokens.requires_grad_(False)
    adapter = put(model, train_also=["lm_head"])
    found = output(model, INPUTS)
    model = wrap(model)
    assert close(output(model, INPUTS), found)
    again = base()
    lortalib.nn.load(again, adapter.save(tmp_path))
    assert close(output(again, INPUTS), found)
    adapter.remove()
    flags = {name.rpartition(".")[0]: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == [
        name for name in flags if name.endswith("embed_tokens")
    ]


@pytest.mark.parametrize("name", ["compile", "DataParallel", "PEFT", "averaged"])
def test_removal_leaves_a_wrapped_model_as_it_was(name):
    wrapped = WHOLE[name](base())
    before = picture(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        put(wrapped).remove()
    assert not changes(before, picture(wrapped))


def test_a_lora_that_stops_training_is_told():
    wrapped = in_peft(base())
    with pytest.warns(UserWarning, match=r"PEFT trains 288 parameters.*freeze=False"):
        adapter = put(wrapped)
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert names
    assert all("lortalib" in name for name in names)
    adapter.remove()
    count = wrapped.get_nb_trainable_parameters()[0]
    assert count == 288
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter = put(wrapped, freeze=False)
        assert wrapped.get_nb_trainable_parameters()[0] == count + adapter.count()
        put(base())
        put(in_peft(base()).requires_grad_(False))


def test_both_train_and_add_up(tmp_path):
    wrapped = in_peft(base())
    adapter = put(wrapped, freeze=False)
    alone = output(wrapped, INPUTS)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    both = output(wrapped, INPUTS)
    assert not close(both, alone)
    with wrapped.disable_adapter():
        assert same_bits(output(wrapped, INPUTS), alone)
    adapter.merge()
    assert close(output(wrapped, INPUTS), both)


def test_ddp_that_does_not_know_the_adapter_is_told(monkeypatch):
    wrapped = in_ddp(base())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        put(wrapped, name="alone")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match=r"DistributedDataParallel holds this model.*first"):
        put(wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [compiled, with_layers(compiled)], ids=["whole", "layers"])
def test_code_that_was_compiled_before_is_not_run_again(wrap, tmp_path):
    """torch.compile does not notice that hooks come or go."""
    wrapped, plain = wrap(base()), base()
    before = output(wrapped, INPUTS)
    assert close(before, output(plain, INPUTS))
    adapter, twin = put(wrapped), put(plain)
    found = output(plain, INPUTS)
    assert not close(found, before, 1e-2)
    for change in ("enable", "merge", "unmerge", "disable", "enable"):
        getattr(adapter, change)()
        getattr(twin, change)()
        assert close(output(wrapped, INPUTS), output(plain, INPUTS)), change
    adapter.save(tmp_path)
    adapter.remove()
    assert close(output(wrapped, INPUTS), before)
    bank = lortalib.nn.bank(wrapped, "cp", 2)
    bank["one"] = tmp_path
    with bank.using(["one"] * 2):
        assert close(output(wrapped, INPUTS), found)
    bank.remove()
    assert close(output(wrapped, INPUTS), before)
