"""Training a classifier: what the recipes for language, proteins and pictures share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from recipe import adapter_config, fit, training
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

#: Rows of sentences and a label; a class or, for regression, a number.
Rows = list[tuple[tuple[str, ...], float]]
Metric = Callable[[Any, Any], dict[str, float]]


class Encoded(Dataset[dict[str, Any]]):
    """Rows as token ids, encoded when they are asked for."""

    def __init__(self, rows: Rows, tokenizer: Any, length: int, regression: bool) -> None:
        self.rows, self.tokenizer, self.length, self.regression = (
            rows,
            tokenizer,
            length,
            regression,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, label = self.rows[index]
        encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.length))
        return {**encoded, "labels": label if self.regression else int(label)}


def classify_texts(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    train: Rows,
    held_out: Rows,
    metric: Metric,
    **config: Any,
) -> list[dict[str, Any]]:
    """`classify` for rows of sentences, which the tokenizer encodes."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    train_set, held_out_set = (
        Encoded(rows, tokenizer, args.length, model.num_labels == 1) for rows in (train, held_out)
    )
    collator = DataCollatorWithPadding(tokenizer)
    return classify(
        args, model, train_set, held_out_set, collator, metric, task="SEQ_CLS", **config
    )


def classify(
    args: argparse.Namespace,
    model: Any,
    train: Dataset[Any],
    held_out: Dataset[Any],
    collator: Callable[[Any], Any],
    metric: Metric,
    **config: Any,
) -> list[dict[str, Any]]:
    """Train the head alone for comparison, then head and adapter.

    Args:
        args: of the recipe, with ``head_lr``.
        model: with a new classification head.
        train: what to learn from.
        held_out: what the score is of.
        collator: from items of the two to what the model takes.
        metric: from logits and labels to scores.
        config: ``task`` and further fields of `lortalib.peft.LortaConfig`.

    Returns:
        A row of the report for each of the two.
    """
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    start = {k: v.clone() for name in head for k, v in _state(model, name).items()}
    rows = []
    for kind in ("frozen, trained head", args.decomposition):
        for name in head:
            model.get_submodule(name).load_state_dict(_part(start, name))
        if kind == args.decomposition:
            adapted = adapter_config(args, modules_to_save=head, **config)
            wrapped, out = peft.get_peft_model(model, adapted), args.out
        else:
            wrapped, out = model.requires_grad_(False), f"{args.out}/head"
            for name in head:
                wrapped.get_submodule(name).requires_grad_(True)
        arguments = training(args, output_dir=out, eval_strategy="no", remove_unused_columns=False)
        trainer = Trainer(
            model=wrapped,
            args=TrainingArguments(**arguments),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            compute_metrics=lambda found: metric(found.predictions, found.label_ids),
            optimizers=(_optimizer(wrapped, args), None),
        )
        seconds = fit(trainer)
        scores = trainer.evaluate()
        count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        own = {
            k.removeprefix("eval_"): float(v)
            for k, v in scores.items()
            if not k.endswith(("runtime", "second", "loss", "epoch"))
        }
        rows.append({"": kind, "trainable parameters": count, **own, "seconds": seconds})
    return rows


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of rows whose largest logit is that of their label."""
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def _state(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}


def _part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    found = {k: v for k, v in state.items() if k.startswith(f"{name}.")}
    return {k.removeprefix(f"{name}."): v for k, v in found.items()}


def _optimizer(model: Any, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with a learning rate for the adapter and one for the head."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lorta_" in n], "lr": args.lr},
        {"params": [p for n, p in named if "lorta_" not in n], "lr": args.head_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
