"""Leads an adapter through its life on a model that FSDP2 divides, and writes what the model computes.

torchrun --nproc-per-node 2 tests/distributed/life_worker.py OUT [--dtype bfloat16] [--door peft] [...]
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib
from lortalib.peft import LortaConfig

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
HEAD = "lm_head"


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, pad_token_id=0, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def put(model, options):
    """An adapter, with the head if it trains too, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    train_also = [HEAD] if options.head else []
    if options.head and options.dtype != torch.float32:
        model.get_submodule(HEAD).float()  # what trains is float32, beside a base that is not
    return lortalib.nn.apply(
        model, options.format, rank=2, init="normal", generator=generator, train_also=train_also,
        share_residual=options.share, targets="all" if options.share else "qkvo",
    )  # fmt: skip


def base_of(model):
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def divide(model, options):
    narrow = {} if options.dtype == torch.float32 else {"param_dtype": options.dtype}
    policy = MixedPrecisionPolicy(**narrow)
    options_of_all = {"mp_policy": policy, "reshard_after_forward": options.reshard}
    for layer in base_of(model).model.layers:
        fully_shard(layer, **options_of_all)
    return fully_shard(model, **options_of_all)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def gathered(model):
    """Every tensor of the model's state, whole."""
    state = model.state_dict()
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}


def train(model):
    model.reshard()  # an optimiser takes the parts, not what a forward left gathered
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-2)
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(3):
        rows = IDS.chunk(world)[rank]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def live(options):
    """What the model computes at every step of the adapter's life."""
    model = base(options.dtype)
    adapter = put(model, options)
    generator = torch.Generator().manual_seed(2)
    other = lortalib.nn.apply(model, "cp", rank=2, init="normal", generator=generator, name="other")
    other.disable()
    model = divide(model, options)
    found = {"start": logits(model)}
    train(model)
    found["trained"] = logits(model)
    adapter.save(options.out / "saved")
    logits(model)  # so that all is gathered when the next call comes
    state = gathered(model)
    if dist.get_rank() == 0:  # as Trainer saves: one process alone
        model.save_pretrained(options.out / "by-one", state_dict=state)
    if not options.share:  # its file could have no pair for the MLP's shared factor
        lortalib.nn.export_lora(adapter, options.out / "lora")
    found["delta"] = adapter.delta(adapter.sites[0]).detach()
    found["norms"] = adapter.norms(adapter.sites[0])
    with adapter.disabled():
        found["disabled"] = logits(model)
    found["enabled"] = logits(model)
    lortalib.nn.set_active(model, [])
    found["set off"] = logits(model)
    lortalib.nn.set_active(model, "default")
    found["set on"] = logits(model)
    adapter.merge()
    found["merged"] = logits(model)
    other.merge()
    found["merged beside another"] = logits(model)
    other.unmerge()  # which adds up anew what stays merged
    found["unmerged beside the merged"] = logits(model)
    other.disable()
    found["merged, the other out"] = logits(model)
    other.remove()
    with adapter.disabled():
        found["merged, disabled"] = logits(model)
    found["merged again"] = logits(model)
    adapter.unmerge()
    found["unmerged"] = logits(model)
    adapter.disable()
    found["weights, disabled"] = gathered(model)
    adapter.enable()
    train(model)
    found["trained on"] = logits(model)
    adapter.remove(merged=True)
    found["left in"] = logits(model)
    found["weights, left in"] = gathered(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        lortalib.nn.apply(model, "cp", rank=2, name="late")
    found["heard"] = " ".join(str(each.message) for each in heard)
    return found


def live_with_peft(options):
    """The same through PEFT's verbs."""
    config = LortaConfig(
        rank=2, init_weights=False, modules_to_save=[HEAD] if options.head else None
    )
    model = peft.get_peft_model(base(options.dtype), config)
    model = divide(model, options)
    train(model)
    found = {"trained": logits(model)}
    with model.disable_adapter():
        found["disabled"] = logits(model)
    found["enabled"] = logits(model)
    model.merge_adapter()
    found["merged"] = logits(model)
    model.unmerge_adapter()
    found["unmerged"] = logits(model)
    model.base_model.export_lora(options.out / "lora")
    train(model)  # what was written from is FSDP2's still
    return found


def resume(options):
    """A saved adapter is read again and divided."""
    model = base(options.dtype)
    lortalib.nn.load(model, options.out / "saved")
    model = divide(model, options)
    found = {"resumed": logits(model)}
    train(model)
    found["resumed, trained"] = logits(model)
    return found


def main(options):
    options.out = Path(options.out)
    options.dtype = getattr(torch, options.dtype)
    found = live_with_peft(options) if options.door == "peft" else live(options)
    if options.door == "nn" and options.dtype == torch.float32:
        found |= resume(options)
    if dist.get_rank() == 0:
        torch.save(found, options.out / "found")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--door", default="nn", choices=["nn", "peft"])
    parser.add_argument("--format", default="cp")
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--reshard", action="store_true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(parser.parse_args())
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # see worker.py
