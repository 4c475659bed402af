"""Trains an adapter under DeepSpeed ZeRO-3, saves it, and writes what was found.

torchrun --nproc-per-node 2 tests/distributed/zero_worker.py OUT FORMAT
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from life_worker import IDS, base

import lortalib

STEPS = 3


def adapted(decomposition):
    """The base with an adapter, and the adapter, the same in every process."""
    model = base()
    generator = torch.Generator().manual_seed(1)
    return model, lortalib.nn.apply(model, decomposition, 2, init="normal", generator=generator)


def copies(adapter):
    return {name: p.detach().clone() for name, p in adapter.networks.named_parameters()}


def trained_alone(decomposition):
    """The factors that one process reaches with both rows."""
    model, adapter = adapted(decomposition)
    optimizer = torch.optim.SGD(adapter.networks.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return copies(adapter)


def refusal(call, *arguments):
    try:
        call(*arguments)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@torch.no_grad()
def logits(engine):
    return engine(input_ids=IDS).logits


def main(out, decomposition):
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed(dist_backend="gloo")
    found = {"alone": trained_alone(decomposition)}
    model, adapter = adapted(decomposition)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": 2,
            "gradient_clipping": 1e9,  # its default is 1
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    engine.train()
    for _ in range(STEPS):
        row = IDS[rank : rank + 1]
        engine.backward(engine(input_ids=row, labels=row).loss)
        engine.step()
    folder = Path(out, str(rank))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found["factors"] = copies(adapter)
        adapter.save(folder / "own")
        adapter.export_lora(folder / "lora")
        found["merging"] = refusal(adapter.merge)
    found["outside"] = [
        refusal(adapter.save, folder / "no"),
        refusal(adapter.export_lora, folder / "no"),
        refusal(adapter.delta, adapter.sites[0]),
    ]
    found["left"] = (folder / "no").exists()
    engine.eval()
    found["trained"] = logits(engine)
    adapter.disable()
    found["disabled"] = logits(engine)
    torch.save(found, Path(out, f"found-{rank}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
