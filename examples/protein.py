"""Protein language: is a peptide antimicrobial? AntiBERTy, a BERT that was trained on antibodies.

    python examples/protein.py
    python examples/protein.py --model facebook/esm2_t33_650M_UR50D --lr 1e-3

5,200 peptides of 11 to 100 residues, half of them antimicrobial (modlAMP's AMPvsUniProt). Reports accuracy
and Matthews' correlation on held-out peptides. Any protein model of transformers will do, with its own
tokenizer.
"""

from __future__ import annotations

import random

import numpy as np
from assets import antiberty, peptides
from classify import Rows, classify
from recipe import parser, quiet, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Run the recipe."""
    arguments = parser(
        __doc__, out="runs/protein", batch=16, length=104, held_out=800, steps=120, head_lr=5e-3
    )
    arguments.add_argument("--head-lr", type=float, help="learning rate of the classifier")
    args = arguments.parse_args()
    quiet()
    name = args.model or antiberty()
    # BERT's tokenizers read words; those of protein models, residues that stand alone.
    rows: Rows = [((" ".join(sequence),), float(label)) for sequence, label in peptides()]
    random.Random(args.seed).shuffle(rows)
    train, held_out = rows[args.held_out :], rows[: args.held_out]
    found = classify(
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


if __name__ == "__main__":
    main()
