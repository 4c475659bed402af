"""What the tests of LoRAs do with their folders."""

import json

import peft
import torch
from safetensors.torch import load_file

import lortalib


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def edit(folder, **changes):
    """Other values in the configuration."""
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **changes}))
    return folder


def loaded_by_peft(family, folder, kind="Model"):
    model = family.model(kind)
    return peft.PeftModel.from_pretrained(model, folder).eval()


# The ranks that vLLM 0.33 allows, read in its source.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def complaints(folder):
    """What vLLM's check of the configuration, llama.cpp's converter and TGI would object to."""
    config, tensors = config_of(folder), tensors_of(folder)
    found = [
        key
        for key in ("use_dora", "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern")
        if config.get(key)
    ]
    found += [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if config["bias"] != "none" or config["modules_to_save"] or config["use_rslora"]:
        found.append("bias, modules_to_save or use_rslora")
    if config["init_lora_weights"] is not True:
        found.append("init_lora_weights")
    # llama.cpp scales by alpha over the rank of each tensor, TGI stacks layers: one rank for all.
    if config["lora_alpha"] != config["r"]:
        found.append("alpha")
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    for name in modules:
        a, b = (tensors.get(f"{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or len(a) != config["r"] or b.shape[1] != config["r"]:
            found.append(name)
    if {f"{m}.lora_{s}.weight" for m in modules for s in "AB"} != set(tensors):
        found.append("other tensors")
    # The names that vLLM and the converter of llama.cpp strip before they look for the module.
    found += [key for key in tensors if not key.startswith("base_model.model.")]
    if config["r"] > max(VLLM_RANKS):
        found.append("rank")
    return found


def random_lora(family, folder, kind="Model", *, seed=4, targets=None, **options):
    """Save a LoRA of random numbers, and return the change of each module's weight, as a linear map has it.

    Without targets, it adapts every attention projection of the family.
    """
    model = family.model(kind)
    paths = targets or sorted({site.path for site in lortalib.nn.sites(model)})
    options = {"target_modules": paths, "r": 3, "lora_alpha": 5, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(init_lora_weights=False, **options)
        ).eval()
    adapted.save_pretrained(folder)
    found = {}
    for path, module in adapted.double().base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            change = module.get_delta_weight("default").detach()
            found[path] = change.mT if module.fan_in_fan_out else change
    return found
