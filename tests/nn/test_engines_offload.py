"""accelerate offloads a base, before or after an adapter is put on it: the adapter has its real numbers."""

import accelerate
import peft
import pytest
import torch
from adapted import close, output, put, same_bits
from models import FAMILIES

import lortalib
from lortalib.nn.door import execution_device
from lortalib.peft import LortaConfig

CPU = torch.device("cpu")
INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
ADAPTERS = {
    "tensor": {},
    "with a head": {"train_also": ["lm_head"]},
    "shared factor": {"share_residual": True, "targets": "all"},
    "on the stream": {"acts_on": "stream"},
}


def base(**config):
    return FAMILIES["Llama"].model("ForCausalLM", tie_word_embeddings=False, **config)


def to_memory(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def partly_to_disk(model, folder):
    """As device_map does where memory is short."""
    layers = {f"model.layers.{k}": "cpu" for k in range(len(model.model.layers))}
    rest = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    own = {name: "disk" for name, _ in model.named_children() if name != "model"}
    where = {**layers, **rest, **own, "model.layers.0": "disk"}
    accelerate.dispatch_model(model, where, offload_dir=folder, force_hooks=True)


each_way = pytest.mark.parametrize("offload", [to_memory, to_disk, partly_to_disk])
each_adapter = pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
each_order = pytest.mark.parametrize("first", ["offload", "adapter"])


def train(model, steps=2):
    trained = [p for p in model.parameters() if p.requires_grad]  # before any forward
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(options, offload, first, folder):
    """An adapter on a plain model, and the same on an offloaded one."""
    plain, model = base(), base()
    if first == "offload":
        offload(model, folder)
    plain_adapter, adapter = put(plain, **options), put(model, **options)
    if first == "adapter":
        offload(model, folder)
    return plain, plain_adapter, model, adapter


@each_way
@each_adapter
@each_order
def test_it_trains_and_computes_what_it_does_elsewhere(offload, options, first, tmp_path):
    plain, _, model, adapter = pair(options, offload, first, tmp_path)
    train(plain)
    train(model)
    assert close(output(model, INPUTS), output(plain, INPUTS))
    assert not any(p.is_meta for p in adapter.parameters())
    with adapter.disabled():
        assert close(output(model, INPUTS), output(base(), INPUTS))
    adapter.remove()
    assert close(output(model, INPUTS), output(base(), INPUTS))


@each_way
@each_adapter
@each_order
def test_its_files_hold_real_numbers_before_any_forward(offload, options, first, tmp_path):
    plain, plain_adapter, _, adapter = pair(options, offload, first, tmp_path / "offloaded")
    for owner, name in ((plain_adapter, "plain"), (adapter, "own")):
        owner.save(tmp_path / name)
        if "share_residual" not in options:  # no other reason than time
            owner.export_lora(tmp_path / f"{name} lora")
    loaded = base()
    lortalib.nn.load(loaded, tmp_path / "own")
    assert close(output(loaded, INPUTS), output(plain, INPUTS))
    for file in tmp_path.glob("plain*/*"):
        assert (
            file.read_bytes()
            == (tmp_path / file.parent.name.replace("plain", "own") / file.name).read_bytes()
        )
    state = adapter.state_dict()
    assert state
    assert all(
        same_bits(tensor, plain_adapter.state_dict()[name]) for name, tensor in state.items()
    )


@pytest.mark.parametrize("first", ["offload", "adapter"])
@pytest.mark.parametrize("options", [ADAPTERS["tensor"], ADAPTERS["on the stream"]])
def test_merging_writes_into_main_memory(options, first, tmp_path):
    plain, plain_adapter, model, adapter = pair(options, to_memory, first, tmp_path)
    unmerged = output(model, INPUTS)
    plain_adapter.merge()
    adapter.merge()
    assert same_bits(output(model, INPUTS), output(plain, INPUTS))
    assert close(output(model, INPUTS), unmerged)
    adapter.unmerge()
    assert same_bits(output(model, INPUTS), unmerged)
    adapter.remove()
    assert same_bits(output(model, INPUTS), output(base(), INPUTS))


@pytest.mark.parametrize("offload", [to_memory, to_disk])
@pytest.mark.parametrize("family", ["Bert", "OPT"])
def test_the_bias_of_a_writer_on_the_stream_is_that_which_accelerate_keeps(
    offload, family, tmp_path
):
    """The update reads the writer's output without its bias, which is a placeholder behind the forward."""
    plain, model = (FAMILIES[family].model("Model") for _ in range(2))
    with torch.no_grad():
        for one, other in zip(plain.parameters(), model.parameters()):
            one.copy_(one + 0.1)
            other.copy_(one)
    offload(model, tmp_path)
    for each in (plain, model):
        put(each, "cp", acts_on="stream", targets="o")
    inputs = {"input_ids": INPUTS["input_ids"]}
    assert close(output(model, inputs), output(plain, inputs))


@pytest.mark.parametrize("offload", [to_disk, partly_to_disk])
def test_merging_into_a_disk_is_refused_and_changes_nothing(offload, tmp_path):
    *_, model, adapter = pair({}, offload, "offload", tmp_path)
    before = output(model, INPUTS)
    with pytest.raises(ValueError, match="is offloaded to a disk"):
        adapter.merge()
    assert (adapter.active, adapter.merged) == (True, False)
    assert same_bits(output(model, INPUTS), before)


def test_merging_into_weights_that_one_memory_holds_twice_is_refused(tmp_path):
    """Placeholders of tied weights are two; what accelerate keeps of them is one."""
    model = base()
    first, second, *_ = model.model.layers
    second.self_attn.o_proj.weight = first.self_attn.q_proj.weight
    to_memory(model, tmp_path)
    adapter = put(model, targets=["q_proj"])
    with pytest.raises(ValueError, match="is also that of"):
        adapter.merge()
    assert not adapter.merged


def test_a_trained_module_whose_weight_is_tied_and_offloaded_is_refused(tmp_path):
    model = base(pad_token_id=None)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    partly_to_disk(model, tmp_path)
    with pytest.raises(ValueError, match="also that of another module"):
        put(model, train_also=["lm_head"])
    assert lortalib.nn.adapters(model) == {}


@each_way
def test_verify_and_check_effect_run_it(offload, tmp_path):
    model = base()
    offload(model, tmp_path)
    assert lortalib.nn.verify(model, INPUTS).ok
    assert all(lortalib.nn.check_effect(put(model), INPUTS).values())


def test_a_module_computes_where_the_hook_that_offloads_it_says():
    """With a second hook, the hook of the module is a sequence of both, which names no device itself."""
    module = torch.nn.Linear(2, 2)
    offloading = accelerate.hooks.AlignDevicesHook(execution_device="cuda:3", offload=True)
    accelerate.hooks.add_hook_to_module(module, offloading)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook(), append=True)
    assert execution_device(module, module.weight) == torch.device("cuda:3")


def test_a_model_without_numbers_is_still_refused(tmp_path):
    with torch.device("meta"):
        model = base()
    with pytest.raises(ValueError, match="meta device"):
        lortalib.nn.verify(model, INPUTS)
    adapter = lortalib.nn.apply(model, "cp", 2)
    with pytest.raises(ValueError, match="meta device"):
        adapter.merge()


# Through PEFT


def wrapped(model, head):
    torch.manual_seed(5)
    names = ["lm_head"] if head else None
    config = LortaConfig(
        rank=2, target_modules=["q_proj", "v_proj"], init_weights=False, modules_to_save=names
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("way", ["get_peft_model", "from_pretrained", "after"])
@pytest.mark.parametrize("offload", [to_memory, to_disk])
def test_peft_trains_saves_and_merges_it(offload, way, head, tmp_path):
    plain, model = wrapped(base(), head), base()
    if way == "from_pretrained":
        train(plain)
    plain.save_pretrained(tmp_path / "start")
    if way == "after":
        model = wrapped(model, head)
    offload(model, tmp_path / "offloaded")
    if way == "get_peft_model":
        model = wrapped(model, head)
    if way == "from_pretrained":
        model = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    for each in (plain, model):
        train(each.train())
        each.eval()
    wanted = output(plain, INPUTS)
    assert close(output(model, INPUTS), wanted)
    with model.disable_adapter():
        assert close(output(model, INPUTS), output(base(), INPUTS))
    model.save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "saved")
    assert close(output(again, INPUTS), wanted)
    model.merge_adapter()
    assert close(output(model, INPUTS), wanted)
    with model.disable_adapter():  # which takes it out of the weights again
        assert close(output(model, INPUTS), output(base(), INPUTS))
    assert close(output(model, INPUTS), wanted)
    assert close(output(model.merge_and_unload(), INPUTS), wanted)
