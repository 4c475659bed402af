"""Declares the commands that write an adapter or a model: their arguments, help texts and examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ._compress import compress
from ._options import add_dtype, add_model_place, add_place, add_places, add_task, add_trust
from ._texts import count, text
from ._write import convert, export_lora, from_lora, merge


def add_writers(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that write.

    Args:
        add: adds a command, given its function, help text, usage and examples.
    """
    merged = add(
        merge,
        "write the model with the adapter in its weights",
        "MODEL FOLDER OUT",
        "MODEL my-adapter merged --dtype bfloat16",
    )
    add_dtype(merged, "auto")
    exported = add(
        export_lora,
        "write the adapter exactly as a standard LoRA of PEFT or llama.cpp",
        "FOLDER OUT",
        "my-adapter my-lora",
        "my-adapter adapter.gguf --format gguf --model MODEL",
        "my-tasks my-lora --task sst2",
    )
    exported.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub; needed for adapters on the residual stream, and "
        "for gguf (default: none)",
    )
    exported.add_argument(
        "--format",
        choices=("peft", "gguf"),
        default="peft",
        help="OUT is a folder for PEFT and vLLM, or a file for llama.cpp (default: peft)",
    )
    imported = add(
        from_lora,
        "write a LoRA of PEFT as an adapter of lortalib, exactly",
        "FOLDER OUT",
        "my-lora my-adapter --model MODEL",
    )
    imported.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub (default: the folder that the LoRA names)",
    )
    converted = add(
        convert,
        "write a folder of lortalib as one of PEFT, or the other way round",
        "FOLDER OUT",
        "my-adapter as-peft",
    )
    compressed = add(
        compress,
        "fit one tensor to LoRAs and adapters of one model",
        "LORA... OUT",
        "my-lora small --to cp --rank 32",
        "lora-1 lora-2 lora-3 together --to 'adapter r, layer matrix r, in r, head out r'",
        "lora-1 lora-2 lora-3 together --to jd --rank 16 --joint",
    )
    compressed.add_argument(
        "--to",
        type=text,
        default="cp",
        metavar="D",
        help="a format or a line of legs (default: cp)",
    )
    compressed.add_argument(
        "--rank", type=count, default=32, metavar="R", help="size of every bond (default: 32)"
    )
    compressed.add_argument(
        "--model",
        type=text,
        metavar="MODEL",
        help="folder of the model, or its name on the hub (default: the folder that the first adapter names)",
    )
    compressed.add_argument(
        "--gqa",
        choices=("pool", "split"),
        default="pool",
        help="where a model has fewer key/value heads than query heads: one tensor for all, or one for k "
        "and v alone (default: pool)",
    )
    compressed.add_argument(
        "--joint",
        action="store_true",
        help="write one folder for all, as an adapter whose tasks they are, with what they share once "
        "(default: a folder for each)",
    )
    compressed.add_argument(
        "--sweeps",
        type=count,
        default=100,
        metavar="N",
        help="largest number of sweeps of the fit (default: 100)",
    )
    add_model_place(merged)
    add_trust(merged)
    for sub in (exported, imported, compressed):
        add_model_place(sub, of="the model of --model")
        add_trust(sub, "the model of --model")
    for sub in (merged, exported, converted):
        add_place(sub)
        add_task(sub)
    add_place(imported)
    add_places(compressed, "LORA")
