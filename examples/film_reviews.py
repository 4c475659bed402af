"""The main job: fine-tune a real encoder on real film reviews through one low-rank tensor.

    python examples/film_reviews.py
    python examples/film_reviews.py --model roberta-base --decomposition tucker --rank 4

Measures the frozen model with a trained head, trains an adapter, evaluates both on held-out text,
saves the adapter, loads it in a fresh process, merges it, and shows that the logits agree.

It goes through `lortalib.nn` and a loop of its own; nlu.py does the same task through PEFT and a Trainer.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from assets import film_reviews, minilm
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lortalib

Rows = list[tuple[str, int]]
Tokenizer = Any


def main() -> None:
    """Run the whole job, or, with --verify, the part that a fresh process plays."""
    args = arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.verify:
        verify(args)
        return

    rows = film_reviews()
    random.Random(args.seed).shuffle(rows)
    train_rows, test_rows = rows[: args.train], rows[-args.test :]
    out = Path(args.out)

    # 1. The frozen model with a trained head.
    model, tokenizer, head = load_model(args)
    model.requires_grad_(False)
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    frozen_seconds = train(model, tokenizer, train_rows, args, "frozen model, trained head")
    frozen = accuracy(model, tokenizer, test_rows)

    # 2. The same, with an adapter: one tensor for every attention projection.
    model, tokenizer, head = load_model(args)
    adapter = lortalib.nn.apply(
        model, args.decomposition, args.rank, alpha=args.alpha, train_also=head
    )
    print(adapter)
    seconds = train(model, tokenizer, train_rows, args, f"{args.decomposition} adapter")
    adapted = accuracy(model, tokenizer, test_rows)

    # 3. Saved, and its logits kept for the comparison.
    adapter.save(out)
    texts = [text for text, _ in test_rows[:16]]
    torch.save(logits(model, tokenizer, texts), out / "logits.pt")
    (out / "texts.txt").write_text("\n".join(texts), encoding="utf-8")

    lora = sum(8 * (site.heads * site.head_dim + site.width) for site in adapter.sites)
    file_size = (out / "adapter.safetensors").stat().st_size
    heads = sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
    table = Table(title=f"{len(test_rows):,} held-out film reviews, {args.steps} steps")
    for column in ("", "trainable parameters", "accuracy", "adapter file", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "frozen, trained head", f"+{heads:,}", f"{frozen:.3f}", "", f"{frozen_seconds:.0f}"
    )
    table.add_row(
        f"{args.decomposition}, rank {args.rank}",
        f"{adapter.count():,} (+{heads:,})",
        f"{adapted:.3f}",
        f"{file_size / 1024:.0f} KiB",
        f"{seconds:.0f}",
    )
    table.add_row("(LoRA, rank 8, would need)", f"{lora:,} (+{heads:,})", "", "", "")
    Console().print(table)

    # 4. A fresh process loads it, merges it, and compares.
    command = [sys.executable, __file__, "--verify", "--out", str(out), "--model", str(args.model)]
    subprocess.run(command, check=True)


def verify(args: argparse.Namespace) -> None:
    """In a fresh process: load the adapter, merge it, and compare the logits."""
    out = Path(args.out)
    model, tokenizer, _ = load_model(args)
    texts = (out / "texts.txt").read_text(encoding="utf-8").split("\n")
    adapter = lortalib.nn.load(model, out)
    loaded = logits(model, tokenizer, texts)
    adapter.merge()
    merged = logits(model, tokenizer, texts)
    trained = torch.load(out / "logits.pt")
    print(
        f"fresh process: logits differ from the trained model's by at most "
        f"{(loaded - trained).abs().max():.1e} as loaded, {(merged - trained).abs().max():.1e} merged"
    )
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)


def load_model(args: argparse.Namespace) -> tuple[nn.Module, Tokenizer, list[str]]:
    """A classifier, its tokenizer, and the names of the modules that are not pretrained."""
    torch.manual_seed(args.seed)  # the new head is the same in every run
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    head = [name for name, part in model.named_children() if name != model.base_model_prefix]
    return model, tokenizer, [name for name in head if any(True for _ in parameters(model, [name]))]


def parameters(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of some submodules."""
    return [p for name in names for p in model.get_submodule(name).parameters()]


def encode(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """A padded batch of at most 48 tokens a text."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt"))


def train(
    model: nn.Module, tokenizer: Tokenizer, rows: Rows, args: argparse.Namespace, what: str
) -> float:
    """AdamW over whatever requires gradients; the learning rate warms up, then falls to zero."""
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and "lortalib" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lortalib" not in n]
    groups = [{"params": adapter, "lr": args.lr}, {"params": head, "lr": args.head_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warm = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - step / args.steps)
    )
    order = random.Random(args.seed)
    start = time.perf_counter()
    model.train()
    bar = tqdm(range(args.steps), desc=what, leave=False)
    for _ in bar:
        texts, labels = zip(*order.sample(rows, args.batch))
        loss = model(**encode(tokenizer, list(texts)), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return time.perf_counter() - start


@torch.inference_mode()
def logits(model: nn.Module, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Logits of one batch."""
    model.eval()
    found: Tensor = model(**encode(tokenizer, texts)).logits
    return found.clone()


def accuracy(model: nn.Module, tokenizer: Tokenizer, rows: Rows) -> float:
    """Share of texts whose larger logit is that of the label."""
    right = 0
    for start in tqdm(range(0, len(rows), 64), desc="evaluating", leave=False):
        texts, labels = zip(*rows[start : start + 64])
        right += int(
            (logits(model, tokenizer, list(texts)).argmax(1) == torch.tensor(labels)).sum()
        )
    return right / len(rows)


def arguments() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="a folder or hub name (default: MiniLM)")
    parser.add_argument("--decomposition", default="indscal", help="a format or a line of legs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=1.0, help="factor of the update")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--head-lr", type=float, default=5e-3, help="of the classifier head")
    parser.add_argument("--train", type=int, default=6000, help="training reviews")
    parser.add_argument("--test", type=int, default=1000, help="held-out reviews")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/film-reviews", help="folder of the saved adapter")
    parser.add_argument("--verify", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or minilm()
    return args


if __name__ == "__main__":
    main()
