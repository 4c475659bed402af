"""Preference optimisation: DPO, with the adapter switched off as the reference model.

    python examples/dpo.py
    python examples/dpo.py --model meta-llama/Llama-2-7b-hf \
        --data argilla/distilabel-intel-orca-dpo-pairs --alpha 16 --dropout 0.05 --lr 5e-5 \
        --steps 500 --batch 1 --accumulate 16 --length 1536

By default SmolLM2-135M-Instruct learns to prefer what people rated as positive: sentences of product
reviews with a mean rating of twenty people above 1.2, against such below -1.2. Reports the accuracy and
the margin of the rewards on held-out pairs. The second line has the paper's model, data and settings.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from assets import rated_sentences, smollm2
from datasets import Dataset, load_dataset
from recipe import adapter_config, begin, chat_tokenizer, fit, option, parser, report, training
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

PROMPT = "My opinion of this product:"


def main() -> None:
    """Run the recipe."""
    arguments = parser(__doc__, out="runs/dpo", batch=6, length=64, held_out=120, steps=60, lr=5e-3)
    arguments.add_argument("--data", help="a set with input, chosen and rejected")
    option(arguments, "beta", 0.1, "strength of the reference")
    args = begin(arguments)
    name = args.model or smollm2()
    rows = pairs(args)
    config = DPOConfig(**training(args), max_length=args.length, beta=args.beta, eval_strategy="no")
    trainer: Any = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        args=config,
        train_dataset=Dataset.from_list(rows[args.held_out :]),
        eval_dataset=Dataset.from_list(rows[: args.held_out]),
        processing_class=chat_tokenizer(name),
        peft_config=adapter_config(args, "CAUSAL_LM"),
    )
    seconds = fit(trainer)
    found = trainer.evaluate()
    report(
        args,
        f"{args.held_out} held-out pairs, {len(rows) - args.held_out:,} trained on",
        [
            {
                "": args.decomposition,
                "trainable parameters": trainer.model.get_nb_trainable_parameters()[0],
                "loss": found["eval_loss"],
                "reward accuracy": found["eval_rewards/accuracies"],
                "reward margin": found["eval_rewards/margins"],
                "seconds": seconds,
            }
        ],
    )


def pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts with a chosen and a rejected continuation, in a random order."""
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]]
    if args.data:
        rows = [
            {
                "prompt": said(system=row.get("system"), user=row["input"]),
                "chosen": said(assistant=row["chosen"]),
                "rejected": said(assistant=row["rejected"]),
            }
            for row in load_dataset(args.data, split="train")
            if row.get("status") != "tie" and (row.get("chosen_score") or 10) >= 8
            if row["chosen"] and row["rejected"]
        ]
    else:
        rated = rated_sentences()
        good = [text for text, rating in rated if rating > 1.2]
        bad = [text for text, rating in rated if rating < -1.2]
        draw.shuffle(good)
        draw.shuffle(bad)
        rows = [
            {"prompt": PROMPT, "chosen": f" {one}", "rejected": f" {two}"}
            for one, two in zip(good, bad)
        ]
    draw.shuffle(rows)
    return rows


def said(**turns: str | None) -> list[dict[str, str]]:
    """Messages of a conversation, by role; a role that says nothing is left out."""
    return [{"role": role, "content": text} for role, text in turns.items() if text]


if __name__ == "__main__":
    main()
