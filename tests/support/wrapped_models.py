"""Tiny models with adapters of random numbers, as PEFT's users make them."""

import warnings

import peft
import torch
from models import FAMILIES

from lortalib.peft import LortaConfig

LLAMA = FAMILIES["Llama"]


def wrapped(family=LLAMA, kind="Model", *, seed=0, name="default", **options):
    """A tiny model with an adapter of random numbers."""
    options = {"decomposition": "cp", "rank": 2, "init_weights": False, **options}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ranks larger than the modes can fill")
        torch.manual_seed(seed)
        model = peft.get_peft_model(family.model(kind), LortaConfig(**options), adapter_name=name)
    return model.eval()


def second(model, name="other", seed=1, **options):
    """One more adapter on it."""
    options = {"decomposition": "cp", "rank": 2, "init_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(name, LortaConfig(**options))
    return model


def factors(model, adapter="default"):
    return dict(model.base_model.lorta_adapters[adapter].networks.named_parameters())


def reloaded(model, folder, family=LLAMA, kind="Model", **options):
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(family.model(kind), folder, **options).eval()
