"""What the tests of LoRAs do with their folders."""

import json

import peft
from safetensors.torch import load_file


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
