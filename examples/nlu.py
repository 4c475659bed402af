"""Language understanding: GLUE with RoBERTa as in the paper, or film reviews with MiniLM.

    python examples/nlu.py
    python examples/nlu.py --preset roberta-base --task mrpc
    python examples/nlu.py --preset roberta-large --task rte --decomposition tt

By default all-MiniLM-L6-v2 learns whether a sentence of a film review is for or against. A preset has the
ranks, learning rates and epochs of the scripts published with LoRTA (arXiv 2410.04060); they were found
with its start, so it comes along (init_weights="lorta").

The default task is that of film_reviews.py, which goes through `lortalib.nn` and a loop of its own; this
goes through PEFT and a Trainer.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
from assets import film_reviews, minilm
from classify import Rows, accuracy, classify_texts
from datasets import load_dataset
from recipe import begin, option, parser, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer

#: Rank and length by model; epochs, learning rate of the classifier and of the adapter by task.
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": {
        "model": "FacebookAI/roberta-base", "rank": 4, "length": 512,
        "sst2": (60, 4e-3, 4e-3), "mrpc": (30, 4e-3, 1e-2), "cola": (80, 1e-3, 1e-2),
        "qnli": (25, 4e-3, 1e-2), "rte": (160, 1e-2, 1e-2), "stsb": (80, 5e-3, 5e-2),
    },
    "roberta-large": {
        "model": "FacebookAI/roberta-large", "rank": 8, "length": 128,
        "sst2": (10, 6e-3, 1e-2), "mrpc": (40, 3e-3, 3e-2), "cola": (40, 6e-3, 1e-2),
        "qnli": (20, 2e-4, 1e-2), "rte": (40, 2e-3, 2e-2), "stsb": (20, 2e-3, 2e-2),
    },
}  # fmt: skip
#: The columns with the sentences of a GLUE task.
COLUMNS = {
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}


def main() -> None:
    """Run the recipe."""
    arguments = parser(__doc__, out="runs/nlu", batch=32, length=48, held_out=1000, steps=120)
    arguments.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="defaults are those of the published scripts; what is given goes before them",
    )
    arguments.add_argument("--task", choices=list(COLUMNS), help="of GLUE (default: film reviews)")
    option(arguments, "head-lr", 5e-3, "learning rate of the classifier")
    chosen = arguments.parse_known_args()[0]
    if chosen.preset:
        arguments.set_defaults(**published(chosen.preset, chosen.task or "sst2"))
    args = begin(arguments)
    if args.task:
        train, held_out, labels, metric = glue(args.task)
    else:
        train, held_out, labels, metric = reviews(args)
    if args.steps is None:
        args.steps = args.epochs * (len(train) // args.batch)
    more = {"init_weights": "lorta"} if args.preset else {}
    name = args.model or minilm()
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
    rows = classify_texts(
        args, model, AutoTokenizer.from_pretrained(name), train, held_out, metric, **more
    )
    report(args, f"{args.task or 'film reviews'}: {len(held_out):,} held out", rows)


def published(model: str, task: str) -> dict[str, Any]:
    """The settings of the published scripts for a model and a task, as defaults of arguments."""
    preset = PRESETS[model]
    shared = {name: preset[name] for name in ("model", "rank", "length")}
    return shared | dict(zip(("epochs", "head_lr", "lr"), preset[task]), batch=64, steps=None)


def reviews(args: argparse.Namespace) -> tuple[Rows, Rows, int, Any]:
    """Film reviews: accuracy on those that were held out."""
    rows: Rows = [((text,), float(label)) for text, label in film_reviews()]
    random.Random(args.seed).shuffle(rows)
    return rows[args.held_out :], rows[: args.held_out], 2, accuracy


def glue(task: str) -> tuple[Rows, Rows, int, Any]:
    """A task of GLUE with its own metric, by the evaluate library."""
    import evaluate

    data, metric = load_dataset("nyu-mll/glue", task), evaluate.load("glue", task)

    def rows(part: str) -> Rows:
        return [(tuple(row[c] for c in COLUMNS[task]), float(row["label"])) for row in data[part]]

    def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = logits.squeeze(-1) if task == "stsb" else logits.argmax(-1)
        result: dict[str, float] = metric.compute(predictions=found, references=labels)
        return result

    return rows("train"), rows("validation"), 1 if task == "stsb" else 2, score


if __name__ == "__main__":
    main()
