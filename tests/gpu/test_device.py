"""Everything with the model on another device than the default one: a GPU where there is one, else the CPU.

What needs CUDA proper (its graphs, its debug mode for synchronisation, a second device) is skipped without
it; that nothing in a forward or backward waits for the device is also checked on a CPU, by the operations
that would wait.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted import close, put, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
KINDS = {
    "cp": {},
    "lotr": {"targets": "all"},
    "indscal": {"targets": "all", "acts_on": "stream"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
#: Operations that hand a number of the device to Python, which waits for it.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "allclose",
    "masked_select",
    "unique",
}


def llama(dtype=torch.float32, device=DEVICE, **sizes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, **sizes,
        }
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype).eval()


def ids(rows=2, length=6):
    words = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))
    return words.to(DEVICE)


def on(model, kind, **options):
    return put(model, kind, generator=None, **{**KINDS[kind], **options})


class Watch(TorchDispatchMode):
    """Fails at an operation that would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@each_kind
def test_a_life_on_the_device(kind, tmp_path):
    base = llama()
    model = copy.deepcopy(base)
    adapter = on(model, kind)
    assert all(p.device.type == DEVICE.type for p in adapter.parameters())
    expected = model(ids()).logits
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    torch.optim.AdamW(lortalib.nn.parameter_groups(adapter, 1e-3)).step()
    trained = model(ids()).logits
    assert not close(trained, expected, 1e-7)
    adapter.save(tmp_path / "own")
    adapter.export_lora(tmp_path / "lora")
    adapter.merge()
    assert close(model(ids()).logits, trained, 1e-4)
    adapter.unmerge()
    assert all(same_bits(p, model.get_parameter(n)) for n, p in base.named_parameters())
    again = copy.deepcopy(base)
    loaded = lortalib.nn.load(again, tmp_path / "own")
    assert all(p.device.type == DEVICE.type for p in loaded.parameters())
    assert close(again(ids()).logits, trained, 1e-6)
    other = copy.deepcopy(base)
    lortalib.nn.load_lora(other, tmp_path / "lora")
    assert close(other(ids()).logits, trained, 1e-4)


def test_directions_from_the_gradient():
    model = llama()
    lortalib.nn.apply(model, "lora_xs", 4)
    lortalib.nn.align_to_gradient(model, [{"input_ids": ids(), "labels": ids()}])


@pytest.mark.parametrize("store", sorted({"cpu", DEVICE.type}))
def test_a_bank_lies_where_it_is_told(store):
    model = llama()
    bank = lortalib.nn.bank(model, "cp", 2, device=store)
    base = llama()
    bank["one"] = put(base, "cp", 2, generator=None)
    expected = base(ids()).logits
    with bank.using(["one", None]), torch.no_grad():
        found = model(ids()).logits
    assert close(found[0], expected[0], 1e-5)
    assert close(found[1], model(ids()).logits[1], 1e-5)


@each_kind
def test_factors_follow_the_model_and_stay_float32_beside_a_narrower_base(kind):
    model = llama(torch.bfloat16)
    adapter = on(model, kind)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters() if p.requires_grad)
    assert model(ids()).logits.dtype == torch.bfloat16
    model.to("cpu")
    assert all(p.device.type == "cpu" for p in adapter.parameters())
    model.to(DEVICE).float()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert model(ids()).logits.isfinite().all()


@each_kind
def test_no_operation_of_a_step_waits_for_the_device(kind):
    model = llama()
    adapter = on(model, kind)
    embedded = model.get_input_embeddings()(ids()).detach()
    places = torch.arange(6, device=DEVICE).expand(2, -1)
    mask = torch.zeros(2, 1, 6, 6, device=DEVICE)

    def step():
        hidden = model.model(
            inputs_embeds=embedded, position_ids=places, attention_mask=mask, use_cache=False
        ).last_hidden_state
        hidden.square().mean().backward()

    step()
    with (
        adapter.keep_pairs(),
        Watch(),
    ):  # on a CPU numbers are compared: that is what is kept out here
        step()


@each_kind
def test_nothing_is_recompiled_from_step_to_step(kind):
    torch.compiler.reset()
    model = llama().train()
    adapter = on(model, kind)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        stance = "default" if step < 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            compiled(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@needs_cuda
@each_kind
def test_torch_sees_no_synchronisation(kind):
    model = llama()
    on(model, kind)
    model(input_ids=ids(), labels=ids()).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids(), labels=ids()).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_kind
def test_a_step_is_captured_as_a_graph(kind):
    model = llama()
    adapter = on(model, kind)
    words = ids()
    trained = [p for p in adapter.parameters() if p.requires_grad]

    def step():
        loss = model(input_ids=words, labels=words, use_cache=False).loss
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [p.grad.clone() / 3 for p in trained]
    for p in trained:
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    assert loss.isfinite()
    assert all(close(p.grad, wanted, 1e-3) for p, wanted in zip(trained, expected))


@needs_cuda
def test_a_model_over_two_devices():
    from accelerate import dispatch_model

    model = llama()
    expected_model = copy.deepcopy(model)
    other = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": other,
              "model.norm": other, "model.rotary_emb": other, "lm_head": other}  # fmt: skip
    model = dispatch_model(model, places)
    adapter = put(model, "cp", 2, generator=None)
    fitted = put(expected_model, "cp", 2, generator=None)
    with torch.no_grad():
        for own, given in zip(fitted.parameters(), adapter.parameters()):
            own.copy_(given)
    assert close(model(ids()).logits.to(DEVICE), expected_model(ids()).logits, 1e-4)


def test_the_benchmark_runs_everywhere(tmp_path):
    command = [
        sys.executable, "benchmarks/gpu/run.py", "--device", DEVICE.type, "--size", "small",
        "--minutes", "0.5", "--modes", "eager", "graph", "--no-tests", "--out", str(tmp_path),
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (page,) = tmp_path.glob("results-*.md")
    text = page.read_text()
    assert "work training step, mode eager" in text
    failed = [
        line for line in ended.stdout.splitlines() if "not run" in line and "no time" not in line
    ]
    assert failed == []
