"""Everything with the model on a GPU where there is one, else on the CPU.

What needs CUDA proper (its graphs, its debug mode for synchronisation, a second device) is skipped without
it; see `pretended_checks` for what a machine without a GPU can know of these.
"""

import copy

import peft
import pytest
import torch
from device_cases import (
    KINDS,
    adapter_of,
    close,
    llama,
    on,
    output,
    randomise,
    same_bits,
    step,
    step_inputs,
    token_ids,
)

import lortalib
from lortalib.peft import LortaConfig

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_life_on_the_device(kind, tmp_path):
    base = llama(device=DEVICE)
    model = copy.deepcopy(base)
    adapter = on(model, kind)
    assert all(p.device.type == DEVICE.type for p in adapter.parameters())
    given = step_inputs(DEVICE, model)
    expected = step(model, given)
    torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-2)).step()
    trained = output(model, given)
    assert not close(trained, expected, 1e-4)
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    adapter.merge()
    assert close(output(model, given), trained, 1e-4)
    adapter.unmerge()
    assert all(same_bits(p, model.get_parameter(n)) for n, p in base.named_parameters())
    for load, folder in ((lortalib.nn.load, "own"), (lortalib.nn.load_lora, "lora")):
        other = copy.deepcopy(base)
        loaded = load(other, tmp_path / folder)
        assert all(p.device.type == DEVICE.type for p in loaded.parameters())
        assert close(output(other, given), trained, 1e-4)


@each_kind
def test_the_numbers_are_those_of_the_cpu(kind):
    model = llama()
    on(model, kind)
    other = copy.deepcopy(model).to(DEVICE)
    expected = step(model, step_inputs("cpu", model))
    assert close(step(other, step_inputs(DEVICE, other)), expected, 1e-4)
    for own, theirs in zip(adapter_of(model).parameters(), adapter_of(other).parameters()):
        assert own.grad is None or close(theirs.grad, own.grad, 1e-4)


def test_directions_from_the_gradient():
    model = llama(device=DEVICE)
    adapter = lortalib.nn.apply(model, "lora_xs", 4)
    words = token_ids().to(DEVICE)
    lortalib.nn.align_to_gradient(model, [{"input_ids": words, "labels": words}])
    assert adapter.config.init == "gradient"
    assert all(p.device.type == DEVICE.type for p in adapter.parameters())


@pytest.mark.parametrize("store", sorted({"cpu", DEVICE.type}))
def test_a_bank_lies_where_it_is_told(store):
    plain = llama(device=DEVICE)
    model, one = copy.deepcopy(plain), copy.deepcopy(plain)
    bank = lortalib.nn.bank(model, "cp", 2, device=store)
    bank["one"] = on(one, "cp")
    assert {t.device.type for tensors in bank["one"].values() for t in tensors} == {store}
    given = step_inputs(DEVICE, model)
    with bank.using(["one", None]):
        found = output(model, given)
    assert close(found[0], output(one, given)[0])
    assert close(found[1], output(plain, given)[1])


def test_adapters_of_peft_on_the_device(tmp_path):
    plain = llama(device=DEVICE)
    model = peft.get_peft_model(copy.deepcopy(plain), LortaConfig(rank=2), adapter_name="ann")
    model.add_adapter("bob", LortaConfig(rank=2))
    trained = [p for n, p in model.named_parameters() if "lorta" in n]
    randomise(trained)
    assert trained
    assert {p.device.type for p in trained} == {DEVICE.type}
    given = step_inputs(DEVICE, plain)
    mixed = output(model.eval(), {**given, "adapter_names": ["ann", "bob"]})
    for k, name in enumerate(["ann", "bob"]):
        model.set_adapter(name)
        assert close(mixed[k], output(model, given)[k], 1e-4)
    step(model, given)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "bob").eval()
    expected = output(model, given)
    assert close(output(again, given), expected, 1e-5)
    assert close(output(again.merge_and_unload(), given), expected, 1e-4)


@each_kind
def test_factors_follow_the_model_and_stay_float32_beside_a_narrower_base(kind):
    model = llama(torch.bfloat16, DEVICE)
    adapter = on(model, kind)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    given = step_inputs(DEVICE, model)
    assert step(model, given).dtype == torch.bfloat16
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)
    model.to("cpu")
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}
    model.to(DEVICE)
    assert {p.device.type for p in adapter.parameters()} == {DEVICE.type}
    step(model, given)


@each_kind
def test_factors_of_a_model_that_is_halved_as_a_whole(kind):
    model = llama(device=DEVICE)
    adapter = on(model, kind)
    expected = output(model, step_inputs(DEVICE, model))
    model.half()
    assert {p.dtype for p in adapter.parameters()} == {torch.float16}
    assert close(output(model, step_inputs(DEVICE, model)), expected, 0.03)


@each_kind
def test_a_step_under_autocast_is_near_one_without(kind):
    model = llama(device=DEVICE)
    adapter = on(model, kind)
    given = step_inputs(DEVICE, model)
    expected = step(model, given)
    exact = [p.grad.clone() for p in adapter.parameters() if p.requires_grad]
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert close(step(model, given), expected, 0.05)
    found = [p.grad for p in adapter.parameters() if p.requires_grad]
    assert all(grad.dtype == torch.float32 for grad in found)
    assert all((a - b).norm() < 0.1 * b.norm() for a, b in zip(found, exact))


@pytest.mark.parametrize("kind", ["indscal", pytest.param("cp", marks=pytest.mark.slow)])
def test_nothing_is_recompiled_from_step_to_step(kind):
    torch.compiler.reset()
    model = llama(device=DEVICE).train()
    adapter = on(model, kind)
    given = step_inputs(DEVICE, model)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number in range(4):
        stance = "default" if number < 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            compiled(**given).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# With CUDA proper


@needs_cuda
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept pairs"])
@each_kind
def test_torch_sees_no_synchronisation(kind, keep):
    model = llama(device=DEVICE)
    adapter = on(model, kind)
    given = step_inputs(DEVICE, model)
    step(model, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if keep:
            with adapter.keep_pairs():
                step(model, given)
                step(model, given)
        else:
            step(model, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_kind
def test_steps_of_a_captured_graph_are_those_of_eager_training(kind):
    from cases import training
    from clock import WARM_UP, as_graph

    plain = llama(device=DEVICE)
    words = token_ids().to(DEVICE)
    models = [copy.deepcopy(plain) for _ in range(2)]
    adapters = [on(model, kind) for model in models]
    eager, other = (training(model, words) for model in models)
    graph = as_graph(other)
    for _ in range(WARM_UP):
        eager.run()
    for _ in range(4):
        assert close(graph.run(), eager.run(), 1e-4)
    for own, theirs in zip(*(adapter.parameters() for adapter in adapters)):
        assert close(theirs, own, 1e-4)


@needs_cuda
@pytest.mark.parametrize("keep", [False, True], ids=["pairs made anew", "kept pairs"])
@each_kind
def test_a_captured_token_is_that_of_eager_decoding(kind, keep):
    from cases import decoding
    from clock import as_graph

    model = llama(device=DEVICE)
    adapter = on(model, kind)
    words = token_ids().to(DEVICE)
    graph = as_graph(decoding(model, words, keep_pairs=keep))
    graph.rewind()
    found = graph.run().clone()
    eager = decoding(model, words, keep_pairs=False)
    assert close(found, eager.run(), 1e-4)
    if keep:
        return
    randomise(adapter.parameters(), seed=5)  # a graph that makes its pairs sees new numbers
    graph.rewind()
    assert not close(graph.run(), found, 1e-4)


@needs_cuda
@each_kind
def test_a_model_over_two_devices(kind):
    from accelerate import dispatch_model

    model = llama()
    expected_model = copy.deepcopy(model)
    on(expected_model, kind)
    other = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb"], "cuda:0")
    places |= dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], other)
    # With another main device accelerate would compute on the GPU what lies on the CPU.
    model = dispatch_model(model, places, main_device="cuda:0" if other != "cpu" else "cpu")
    on(model, kind)
    expected = step(expected_model, step_inputs("cpu", expected_model))
    assert close(step(model, step_inputs("cuda:0", model)), expected, 1e-4)
    for own, theirs in zip(adapter_of(expected_model).parameters(), adapter_of(model).parameters()):
        assert own.grad is None or close(theirs.grad, own.grad, 1e-4)
