"""Trains a tiny model for a few steps, alone or as one of several processes, and saves the factors.

torchrun --nproc-per-node 2 tests/distributed/worker.py ENGINE OUT [--checkpoint KIND] [...]
"""

import argparse
import os
import sys
from contextlib import nullcontext

import peft
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib
from lortalib.peft import LortaConfig

ROWS, STEPS = 8, 3
#: The task of each row: both in each process, or one in each.
TASKS = {"tasks": ["a", "b"] * 4, "tasks apart": ["a"] * 4 + ["b"] * 4}


def made(door):
    """A model and the parameters that train, the same in every process."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, pad_token_id=0,
        )
    )  # fmt: skip
    if door == "peft":
        return peft.get_peft_model(model, LortaConfig(rank=2))
    if door in TASKS:
        lortalib.nn.apply(model, "metatt_41d", rank=2, tasks=["a", "b"])
    else:
        lortalib.nn.apply(model, "cp", rank=2)
    return model


def using(model, door, rows):
    """The context in which these rows of the batch have their tasks."""
    if door not in TASKS:
        return nullcontext()
    return lortalib.nn.adapters(model)["default"].using(TASKS[door][rows])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(5, 60, (ROWS, 7), generator=generator)


def sharded(model):
    """Every layer by itself, then what is left, as FSDP2 is used."""
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def accelerated(model, optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model, optimizer)


def train(options):
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = made(options.door).train()
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if options.checkpoint:
        base.enable_input_require_grads()
        kind = {"use_reentrant": options.checkpoint == "reentrant"}
        base.gradient_checkpointing_enable(kind)
    if options.engine == "fsdp":
        model = sharded(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    if options.engine == "ddp":
        model = DistributedDataParallel(model, static_graph=options.static)
    if options.engine == "accelerate":
        model, optimizer = accelerated(model, optimizer)
    own = ROWS // world
    for step in range(STEPS):
        mine = range(rank * own, (rank + 1) * own)
        for part in torch.tensor(mine).chunk(options.accumulate):
            ids = batch(step)[part]
            with using(base, options.door, slice(int(part[0]), int(part[-1]) + 1)):
                loss = model(input_ids=ids, labels=ids).loss / options.accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, p in zip(names, parameters):
        found[name] = p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach()
    if rank == 0:
        torch.save(found, options.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["single", "ddp", "fsdp", "accelerate"])
    parser.add_argument("out")
    parser.add_argument("--door", default="nn", choices=["nn", "peft", *TASKS])
    parser.add_argument("--checkpoint", choices=["reentrant", "other"])
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    train(parser.parse_args())
    if dist.is_initialized():
        # Without it, a process that leaves while the other still gathers is aborted under load.
        dist.barrier()
        dist.destroy_process_group()
    # Once a process was aborted here ("terminate called without an active exception"), all being saved;
    # presumably a thread of gloo that asked for the interpreter's lock while it shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
