"""Proteins: is a peptide antimicrobial, and how does a chain fold?

    python examples/protein.py
    python examples/protein.py --model facebook/esm2_t33_650M_UR50D --lr 1e-3
    python examples/protein.py --task fold
    python examples/protein.py --task fold --model facebook/esmfold_v1 --data FOLDER_OF_PDB_FILES \
        --length 256 --held-out 20 --recycles 3 --recompute --lr 1e-3 --steps 500

5,200 peptides of 11 to 100 residues, half of them antimicrobial (modlAMP's AMPvsUniProt), for AntiBERTy,
a BERT that was trained on antibodies. Reports accuracy and Matthews' correlation on held-out peptides. Any
protein model of transformers will do, with its own tokenizer.

With --task fold the language model inside an ESMFold learns from structures; the folding trunk stays as it
is. Reports lDDT and RMSD of the CA atoms. No ESMFold comes in a package, so by default it is a small one
with random weights that learns one real chain by heart, which proves the path and nothing more: on other
chains it stays as random as it was.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folding
import numpy as np
import peft
from assets import antiberty, chains, peptides
from classify import Rows, classify_texts
from recipe import adapter_config, begin, fit, option, parser, report, training
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)


def main() -> None:
    """Run the recipe."""
    arguments = parser(__doc__, out="runs/protein", batch=16, length=104, held_out=800, steps=120)
    arguments.add_argument(
        "--task",
        choices=("peptides", "fold"),
        default="peptides",
        help="what is learnt; --task fold has defaults of its own (default: peptides)",
    )
    option(arguments, "head-lr", 5e-3, "learning rate of the classifier")
    arguments.add_argument("--data", help="folder of .pdb and .cif files (default: five chains)")
    option(arguments, "recycles", 0, "passes before the last one")
    arguments.add_argument(
        "--recompute", action="store_true", help="the trunk in the backward pass, for less memory"
    )
    if arguments.parse_known_args()[0].task == "fold":
        own = {"steps": 100, "batch": 1, "lr": 3e-2, "rank": 16}
        arguments.set_defaults(task="fold", out="runs/fold", length=128, held_out=4, **own)
    args = begin(arguments)
    run = structures if args.task == "fold" else antimicrobial
    run(args)


def antimicrobial(args: argparse.Namespace) -> None:
    """Train a classifier of peptides."""
    name = args.model or antiberty()
    # BERT's tokenizers read words; those of protein models, residues that stand alone.
    rows: Rows = [((" ".join(sequence),), float(label)) for sequence, label in peptides()]
    random.Random(args.seed).shuffle(rows)
    train, held_out = rows[args.held_out :], rows[: args.held_out]
    found = classify_texts(
        args,
        AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
        AutoTokenizer.from_pretrained(name),
        train,
        held_out,
        scores,
    )
    report(args, f"antimicrobial or not: {len(held_out):,} held-out peptides", found)


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and Matthews' correlation coefficient."""
    found = logits.argmax(-1)
    correlation = float(np.corrcoef(found, labels)[0, 1]) if len(set(found)) > 1 else 0.0
    return {"accuracy": float((found == labels).mean()), "MCC": correlation}


def structures(args: argparse.Namespace) -> None:
    """Train the language model of an ESMFold on structures."""
    rows = [chain.first(args.length) for chain in folding.read_folder(Path(args.data or chains()))]
    random.Random(args.seed).shuffle(rows)
    kept = len(rows) - args.held_out
    train, held_out = rows[: max(0, kept)], rows[max(0, kept) :]
    if not train:
        raise SystemExit(f"{len(rows)} chains, {args.held_out} held out: none is left to train on")
    model: Any = folding.pretrained(args.model, args.recompute) if args.model else folding.small()
    size = {"language model": model.esm.num_parameters(), "all": model.num_parameters()}
    # The PEFT model is the language model alone: beside the trunk, whose attention lortalib cannot
    # read, its projections would be matrices without heads. So this puts it into a released ESMFold:
    # model.esm = PeftModel.from_pretrained(model.esm, "runs/fold")
    model.esm = peft.get_peft_model(model.esm, adapter_config(args, "FEATURE_EXTRACTION"))
    trainer: Any = folding.FoldingTrainer(
        model,
        args.recycles,
        model=model.esm,
        # Structures need more digits than bfloat16 has.
        args=TrainingArguments(**training(args, bf16=False, remove_unused_columns=False)),
        train_dataset=train,
        data_collator=folding.collate,
    )
    sets = {"held out": held_out, "trained on": train[: max(1, len(held_out))]}
    sets = {name: part for name, part in sets.items() if part}
    with model.esm.disable_adapter():
        before = {name: folding.scores(model, part, args.recycles) for name, part in sets.items()}
    seconds = fit(trainer)
    model.esm = trainer.model
    after = {name: folding.scores(model, part, args.recycles) for name, part in sets.items()}
    count = trainer.model.get_nb_trainable_parameters()[0]
    table = []
    for name in sets:
        table.append(
            {"": f"{name}, base", "trainable parameters": 0, **means(before[name]), "seconds": 0.0}
        )
        own = {"": f"{name}, {args.decomposition}", "trainable parameters": count}
        table.append({**own, **means(after[name]), "seconds": seconds})
    title = f"{len(held_out)} held-out chains, {len(train):,} trained on: CA atoms, RMSD in Å"
    report(args, title, table, numbers_of_the_model=size, chains={"before": before, "after": after})


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the scores of chains."""
    return {key: float(np.mean([row[key] for row in rows])) for key in ("loss", "lDDT", "RMSD")}


if __name__ == "__main__":
    main()
