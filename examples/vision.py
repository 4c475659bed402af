"""Pictures: a vision transformer that knows upright digits learns to read those that lie on their side.

    python examples/vision.py
    python examples/vision.py --model google/vit-base-patch16-224-in21k --data uoft-cs/cifar100 \
        --steps 2000

By default a small ViT is trained on 4,000 digits of MNIST, once, and kept. What it then meets is the same
digits turned by a quarter and each of them slanted, scaled and moved its own way. Reports accuracy on
digits that neither training saw. The second line has a ViT and pictures of the hub: any classifier and
any set with a column of pictures and one of classes will do. ViTs were adapted through tensors by FacT
(arXiv 2212.03145) and CaRA (ICML 2025).
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import datasets
import torch
from assets import CACHE, digits
from classify import accuracy, classify
from PIL import Image
from recipe import begin, option, parser, report, training
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    get_cosine_schedule_with_warmup,
)

#: Digits that both trainings learn from; the score is of others.
LEARNT = 4000


def main() -> None:
    """Run the recipe."""
    arguments = parser(__doc__, out="runs/vision", batch=64, held_out=1000, steps=600)
    arguments.add_argument(
        "--data", help="folder or hub name of a set of pictures (default: from a package)"
    )
    option(arguments, "pretrain-steps", 700, "of the small ViT")
    option(arguments, "head-lr", 2e-2, "learning rate of the classifier")
    args = begin(arguments)
    with TrainingArguments(**training(args)).main_process_first():  # others read what it wrote
        name = args.model or small_vit(args.pretrain_steps)
    train, held_out = labelled(args) if args.data else turned_digits(args)
    picture, label = columns(train)
    torch.manual_seed(args.seed)  # a new head is the same in every run
    model = AutoModelForImageClassification.from_pretrained(
        name, num_labels=train.features[label].num_classes, ignore_mismatched_sizes=True
    )
    processor = AutoImageProcessor.from_pretrained(name)

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        pictures = [one.convert("RGB") for one in rows[picture]]
        return {**processor(pictures, return_tensors="pt"), "labels": rows[label]}

    train, held_out = (part.with_transform(encode) for part in (train, held_out))
    # PEFT has no task for pictures. The two papers adapt the MLPs of a ViT, too.
    config = {"task": None, "target_modules": "all-linear"}
    rows = classify(args, model, train, held_out, default_data_collator, accuracy, **config)
    report(args, f"{args.data or 'turned digits'}: {len(held_out):,} held out", rows)


def labelled(args: argparse.Namespace) -> tuple[Any, Any]:
    """A set to learn from and one for the score; held-out rows of the first where it stands alone."""
    found = datasets.load_dataset(args.data)
    for part in ("validation", "test"):
        if part in found:
            return found["train"], found[part]
    parts = found["train"].train_test_split(args.held_out, seed=args.seed)
    return parts["train"], parts["test"]


def columns(data: Any) -> tuple[str, str]:
    """The names of the first column of pictures and the first of classes."""
    kinds = (datasets.Image, datasets.ClassLabel)
    picture, label = (
        next(name for name, found in data.features.items() if isinstance(found, kind))
        for kind in kinds
    )
    return picture, label


def turned_digits(args: argparse.Namespace) -> tuple[Any, Any]:
    """The digits on their side, those to learn from and those held out."""
    pictures, labels = upright_digits()
    turned = moved(pictures, torch.Generator().manual_seed(args.seed), turn=90.0)
    grey = (255 * turned).round().byte().squeeze(1).numpy()
    rows = {"image": [Image.fromarray(one) for one in grey], "label": labels.tolist()}
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    found = datasets.Dataset.from_dict(rows, kinds)
    last = min(LEARNT + args.held_out, len(found))
    return found.select(range(LEARNT)), found.select(range(LEARNT, last))


def upright_digits() -> tuple[Tensor, Tensor]:
    """Grey values from 0 to 1, (digits, 1, 28, 28), and labels, in an order that is always the same."""
    rows = digits()
    random.Random(0).shuffle(rows)  # not by --seed: what was held out must stay held out
    values = bytearray(b"".join(picture for picture, _ in rows))
    pictures = torch.frombuffer(values, dtype=torch.uint8).view(-1, 1, 28, 28) / 255
    return pictures, torch.tensor([label for _, label in rows])


def moved(pictures: Tensor, draw: torch.Generator, turn: float = 0.0) -> Tensor:
    """Each picture turned, scaled, slanted and moved a little, its own way.

    Args:
        pictures: (pictures, channels, height, width).
        draw: where the ways come from.
        turn: degrees by which all are turned on top of that.
    """

    def within(size: float) -> Tensor:
        return size * (2 * torch.rand(len(pictures), generator=draw) - 1)

    angle, scale, slant = torch.deg2rad(turn + within(12.0)), 1 + within(0.1), within(0.1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, scale * slant - sin, within(0.1), sin, cos, within(0.1)]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pictures.shape), False)
    return grid_sample(pictures, grid, align_corners=False)


def small_vit(steps: int) -> Path:
    """A ViT of 4 layers, width 96, 3 heads, that reads upright digits, as a Hugging Face folder.

    It is trained once for every number of steps.
    """
    target = CACHE / f"vit-digits-{steps}"
    if not (target / "config.json").exists():
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        pretrain(steps).save_pretrained(aside)
        half, size = [0.5, 0.5, 0.5], {"height": 28, "width": 28}
        processor = {"size": size, "image_mean": half, "image_std": half}
        (aside / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", **processor}), encoding="utf-8"
        )
        aside.rename(target)
    return target


def pretrain(steps: int) -> Any:
    """Train a ViT on upright digits, each moved anew whenever it is seen."""
    pictures, labels = upright_digits()
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        id2label={number: str(number) for number in range(10)},
        initializer_range=0.08,  # near 1/sqrt(width): with the usual 0.02 it learns far slower
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = ViTForImageClassification(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

    def logits(batch: Tensor) -> Tensor:
        found: Tensor = model((2 * batch - 1).expand(-1, 3, -1, -1).to(device)).logits
        return found

    bar = tqdm(range(steps), desc="training a small ViT on upright digits, once")
    for _ in bar:
        chosen = torch.randint(LEARNT, (128,), generator=draw)
        found = logits(moved(pictures[chosen], draw))
        loss = torch.nn.functional.cross_entropy(found, labels[chosen].to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.inference_mode():
        right = logits(pictures[LEARNT:]).argmax(-1).cpu() == labels[LEARNT:]
    print(
        f"the small ViT reads {right.float().mean():.3f} of {len(right):,} held-out upright digits"
    )
    return model.eval()


if __name__ == "__main__":
    main()
