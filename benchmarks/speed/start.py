"""Does the first step of a fresh network act equally strongly at every rank?

For each format and rank: a random upstream gradient over all projections of a model of 6 layers, 8 heads,
4 matrices, width 256 (heads of 32) and 128 tokens for each. Measured: the root mean square change of the
outputs when the parameters step by the sign of the gradient (the first step of Adam), and the norm of the
gradient; both divided by their values at rank 1. The published start (kaiming, alpha / rank) is beside it.

    python benchmarks/speed/start.py   writes start.md beside it
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path

import torch

from lortalib import decomp

SHAPE = decomp.Shape((6, 8, 4, 256, 32))
RANKS = (1, 4, 16, 64, 256)
FORMATS = ("cp", "tucker", "tt", "ring", "lotr", "fact_tk", "cara", "lora")
SEEDS = 3
TOKENS = 128


def outputs(net: decomp.Network, x: torch.Tensor) -> torch.Tensor:
    """Outputs of every projection, (layer, matrix, token, head*out), for each its own input."""
    rows = []
    for layer in range(SHAPE["layer"]):
        for matrix in range(SHAPE["matrix"]):
            a, b = net.select(layer=layer, matrix=matrix).cut()
            rows.append(x[layer, matrix] @ a.mT @ b.mT)
    return torch.stack(rows)


def first_step(name: str, rank: int, init: str, seed: int) -> tuple[float, float]:
    """Change of the outputs by a step of the gradient's sign, and the norm of the gradient."""
    torch.manual_seed(seed)
    net = decomp.get_format(name)(SHAPE, rank, init=init)
    x = torch.randn(SHAPE["layer"], SHAPE["matrix"], TOKENS, SHAPE["in"])
    features = SHAPE["head"] * SHAPE["out"]
    upstream = torch.randn(SHAPE["layer"] * SHAPE["matrix"], TOKENS, features)
    scaling = 1 / rank if init == "lorta" else 1.0
    (outputs(net, x) * upstream).sum().mul(scaling).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign()
        moved = outputs(net, x).square().mean().sqrt().item() * scaling
    return moved, norm


def main() -> None:
    """Measure every format and write the table."""
    warnings.simplefilter("ignore", UserWarning)  # ranks of short modes are cut
    lines = [
        f"| format | start | measured | {' | '.join(f'rank {rank}' for rank in RANKS)} |",
        f"|---|---|---|{'---|' * len(RANKS)}",
    ]
    for name in FORMATS:
        for init in ("invariant", "lorta"):
            found = [
                [first_step(name, rank, init, seed) for seed in range(SEEDS)] for rank in RANKS
            ]
            for k, measured in enumerate(("change of outputs", "gradient norm")):
                values = [statistics.median(pair[k] for pair in pairs) for pairs in found]
                cells = " | ".join(f"{value / values[0]:.3g}" for value in values)
                lines.append(f"| {name} | {init} | {measured} | {cells} |")
                print(lines[-1], flush=True)
    text = f"Relative to rank 1, medians of {SEEDS} seeds.\n\n" + "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
