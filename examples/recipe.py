"""What the recipes share: arguments, the adapter, a Trainer that resumes, and the report.

A recipe is a script that says what its data and its score are. Each runs here on models and data
from packages, and on those of the paper where the hub can be reached; each can be killed and
started again with the same arguments (run_folder.py); `accelerate launch` runs it on several processes.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from run_folder import RESULTS, claim, folder_of, last_checkpoint, results, write_json
from transformers import AutoTokenizer

from lortalib.decomp import get_format
from lortalib.peft import LortaConfig


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments of every recipe.

    Args:
        doc: the recipe's docstring.
        defaults: defaults that are the recipe's own; ``out`` is one.
    """
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", help="folder or hub name (default: the one from a package)")
    for name, default, said in (
        ("decomposition", "cp", "a format, as cp, tt or lotr, or a line of legs"),
        ("rank", 8, "of every bond"),
        ("alpha", 1.0, "factor of the update"),
        ("dropout", 0.0, "of the adapter's input"),
        ("lr", 1e-2, "learning rate of the adapter"),
        ("steps", 100, "of the optimiser"),
        ("batch", 16, "rows of a step on one process"),
        ("accumulate", 1, "batches of a step"),
        ("length", 128, "longest row, in tokens"),
        ("held-out", 400, "rows kept for the score"),
        ("save-every", 50, "steps between checkpoints"),
        ("seed", 0, "of the order of rows and of what is new in the model"),
        ("out", None, "folder of checkpoints, adapter and results.json"),
    ):
        option(found, name, default, said)
    found.set_defaults(**defaults)
    return found


def format_of(given: str) -> str:
    """A name of a format or a line of legs, refused here and not after minutes of training."""
    try:
        get_format(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return given


def positive(given: str) -> int:
    """An integer of at least 1."""
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1 is needed; found {given}")
    return int(given)


#: How arguments are read of which not every value of their type will do.
KINDS = {"decomposition": format_of} | dict.fromkeys(
    ("rank", "batch", "accumulate", "length", "held-out", "save-every"), positive
)


def option(arguments: argparse.ArgumentParser, name: str, default: Any, said: str) -> None:
    """An argument with the type of its default, which its help shows."""
    kind = KINDS.get(name, type(default) if default is not None else str)
    arguments.add_argument(
        f"--{name}", type=kind, default=default, help=f"{said} (default: %(default)s)"
    )


def begin(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments and take the folder of the run.

    The same ``--seed`` gives the same new head and adapter. Of messages only errors are left; progress
    bars of training stay.

    Args:
        arguments: of `parser`, with the recipe's own.

    Raises:
        SystemExit: the run is finished (its report is printed), or the folder is another run's.
    """
    args = arguments.parse_args()
    folder = folder_of(arguments, args)
    args.out = str(folder)
    first = PartialState().is_main_process
    claim(folder, args, write=first)
    finished = results(folder)
    if finished is not None:
        if first:
            show(finished["title"], finished["rows"])
            print(f"finished before, in {folder}; remove it to train again")
        raise SystemExit(0)
    transformers.set_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return args


def adapter_config(args: argparse.Namespace, task: str | None, **more: Any) -> LortaConfig:
    """The configuration of the adapter.

    Args:
        args: of `parser`.
        task: PEFT's name of the task, such as ``"CAUSAL_LM"``; None where it has none.
        more: fields of `LortaConfig`.
    """
    return LortaConfig(
        rank=args.rank,
        decomposition=args.decomposition,
        alpha=args.alpha,
        dropout=args.dropout,
        task_type=task,
        **more,
    )


#: Alpaca's form of a prompt (github.com/tatsu-lab/stanford_alpaca), a system's message before it.
ALPACA = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'assistant' %}{{ '### Response:\n' + turn.content + eos_token }}"
    "{% elif turn.role == 'user' %}{{ '### Instruction:\n' + turn.content + '\n\n' }}"
    "{% else %}{{ turn.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def chat_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model; that of a base model, which has no chat template, gets Alpaca's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or ALPACA
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def training(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Arguments for any Trainer; a checkpoint holds the adapter, its optimiser, and no base."""
    return {
        "output_dir": args.out,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, args.steps // 10),
        "weight_decay": 0.0,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "logging_steps": max(1, args.steps // 20),
        "save_steps": args.save_every,
        "save_total_limit": 2,
        "seed": args.seed,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        **more,
    }


def fit(trainer: Any) -> float:
    """Train, from the last whole checkpoint where there is one, and save the adapter.

    Returns:
        Seconds, of this run alone.
    """
    start = time.perf_counter()
    checkpoint, step = last_checkpoint(Path(trainer.args.output_dir)) or (None, 0)
    if checkpoint is not None and step >= trainer.args.max_steps:
        # Nothing is left to train, and a Trainer that resumes at its last step takes one more.
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return time.perf_counter() - start


def report(
    args: argparse.Namespace, title: str, rows: Sequence[dict[str, Any]], **more: Any
) -> None:
    """Print a table of the rows and write everything to results.json; of processes, the first does.

    Args:
        args: of the recipe; they are written too.
        title: of the table.
        rows: records with the same keys.
        more: what is only written.
    """
    if not PartialState().is_main_process:
        return
    show(title, rows)
    found = {
        "title": title,
        "arguments": vars(args),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": list(rows),
        **more,
    }
    file = Path(args.out, RESULTS)
    write_json(file, found)
    print(f"wrote {file}")


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print records with the same keys as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(f"{v:,.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
