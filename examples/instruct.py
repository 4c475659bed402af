"""Instruction tuning: supervised, in the model's chat template, with the loss on the answer alone.

    python examples/instruct.py
    python examples/instruct.py --model meta-llama/Llama-2-7b-hf --data tatsu-lab/alpaca \
        --alpha 16 --dropout 0.05 --lr 4e-4 --steps 12750 --batch 4 --accumulate 4 --length 512

By default SmolLM2-135M-Instruct learns short conversations. Reports the loss on held-out answers, and
writes answers to held-out questions before and after. The second line has the paper's model, data
and settings (lr 1e-2 for the 13B model).
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from assets import conversations, smollm2
from datasets import Dataset, load_dataset
from recipe import adapter_config, begin, chat_tokenizer, fit, option, parser, report, training
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Run the recipe."""
    arguments = parser(__doc__, out="runs/instruct", batch=8, length=96, held_out=100, steps=80)
    arguments.add_argument(
        "--data", help="a set with instruction and output (default: from a package)"
    )
    option(arguments, "samples", 5, "answers to write")
    args = begin(arguments)
    name = args.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = chat_tokenizer(name)
    rows = questions(args)
    held_out = rows[: args.held_out]
    known = {question for question, _ in held_out}
    # A question may have several answers; none of a held-out one is trained on.
    train = [row for row in rows[args.held_out :] if row[0] not in known]
    config = SFTConfig(
        **training(args), max_length=args.length, completion_only_loss=True, eval_strategy="no"
    )
    trainer: Any = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([chat(*row) for row in train]),
        eval_dataset=Dataset.from_list([chat(*row) for row in held_out]),
        processing_class=tokenizer,
        peft_config=adapter_config(args, "CAUSAL_LM"),
    )
    asked = [question for question, _ in held_out[: args.samples]]
    with trainer.model.disable_adapter():
        before = trainer.evaluate()["eval_loss"]
        said = answers(trainer.model, tokenizer, asked)
    seconds = fit(trainer)
    after = trainer.evaluate()["eval_loss"]
    samples = [
        {"question": question, "wanted": wanted, "before": one, "after": two}
        for (question, wanted), one, two in zip(
            held_out, said, answers(trainer.model, tokenizer, asked)
        )
    ]
    count = trainer.model.get_nb_trainable_parameters()[0]
    report(
        args,
        f"{len(held_out)} held-out answers, {len(train):,} trained on",
        [
            {"": "base", "trainable parameters": 0, "loss": before, "seconds": 0.0},
            {
                "": args.decomposition,
                "trainable parameters": count,
                "loss": after,
                "seconds": seconds,
            },
        ],
        samples=samples,
    )


def questions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of question and answer, in a random order."""
    if args.data:
        rows = [
            ("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])
            for row in load_dataset(args.data, split="train")
        ]
    else:
        rows = conversations()
    random.Random(args.seed).shuffle(rows)
    return rows


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row as TRL reads it; the loss is on the completion."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, asked: list[str]) -> list[str]:
    """What the model says, greedily."""
    model.eval()
    said = []
    for question in asked:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        found = model.generate(**ids, max_new_tokens=40, do_sample=False)
        said.append(
            tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return said


if __name__ == "__main__":
    main()
