"""Compresses LoRAs of PEFT that were trained here: rank against error, and against the task's metric.

    python benchmarks/quality/compress.py

trains three LoRAs on parts of the film reviews (all-MiniLM-L6-v2), compresses one alone and all three
together, scores what comes out before and after a few steps of further training, and writes compress.md.
A random LoRA of Llama-2-7B's shape comes first, for time and memory. Ten minutes of one core.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from tasks import BERT, TASKS, Task, autocast
from torch import nn
from transformers import LlamaConfig

import lortalib

OUT = Path(__file__).with_suffix(".md")
#: Steps of each LoRA, and of the training that follows compression; rows of a step.
STEPS, MORE, BATCH = 150, 30, 16
RATE, MORE_RATE, HEAD_RATE = 1e-3, 2e-3, 2e-3
RANK = 8
SHARED = "in p, adapter layer matrix p q, head out q"
#: What one LoRA, and all three together, are compressed to.
ALONE = [("cp", r) for r in (4, 16, 64)] + [("tucker", 8)]
ALONE += [("lotr", r) for r in (8, 32)] + [("lora", r) for r in (1, 2)]
TOGETHER = [("cp", 16), ("cp", 64), (SHARED, 8), (SHARED, 32)]


def parts() -> list[Task]:
    """The film reviews, their training rows in three parts."""
    whole = dataclasses.replace(TASKS["reviews"], steps=STEPS, batch=BATCH, test=600)
    rows = whole.divided()
    return [
        dataclasses.replace(whole, rows={**rows, "train": rows["train"][k::3]}) for k in range(3)
    ]


def learn(task: Task, model: nn.Module, groups: list[dict[str, object]], steps: int) -> None:
    """Train parameters in place.

    Args:
        task: whose rows and loss they are.
        model: the model, which is left in training.
        groups: parameters with their learning rates.
        steps: how many.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    model.train()
    for _, rows in zip(range(steps), task.batches(seed=1)):
        optimizer.zero_grad()
        with autocast():
            loss = task.loss(model, rows)
        loss.backward()
        optimizer.step()


def accuracy(task: Task, model: nn.Module) -> float:
    """Score a model on the test rows."""
    with autocast():
        return task.score(model, "test")["accuracy"]


def train_lora(task: Task, seed: int, folder: Path) -> Path:
    """Train a LoRA of PEFT and the classifier, and save both."""
    model, new = task.fresh(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=BERT, modules_to_save=new)
    adapted = peft.get_peft_model(model, config)
    named = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    sides = [p for n, p in named if "lora_" in n]
    head = [p for n, p in named if "lora_" not in n]
    learn(task, adapted, [{"params": sides, "lr": RATE}, {"params": head, "lr": HEAD_RATE}], STEPS)
    adapted.save_pretrained(folder)
    return folder


def before_and_after(task: Task, folder: Path) -> tuple[float, float]:
    """Score a saved adapter on the test rows, and again after further training."""
    model, _ = task.fresh(0)
    read = lortalib.nn.load_lora if (folder / "adapter_config.json").exists() else lortalib.nn.load
    adapter = read(model, folder)
    before = accuracy(task, model)
    rate = RATE if adapter.config.decomposition == "lora" else MORE_RATE
    learn(task, model, lortalib.nn.parameter_groups(adapter, rate, modules_lr=HEAD_RATE), MORE)
    return before, accuracy(task, model)


def without_update(task: Task, folder: Path) -> float:
    """Score the classifier of a LoRA on the base without the LoRA's update."""
    model, _ = task.fresh(0)
    adapter = lortalib.nn.load_lora(model, folder)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    return accuracy(task, model)


Row = tuple[str, object, int, float, str, str, float]


def compressed(tasks: Sequence[Task], folders: Sequence[Path], line: str, rank: int) -> Row:
    """Compress LoRAs and score what comes out; several scores are averaged."""
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks that short modes cannot fill are cut
        found = lortalib.nn.compress(tasks[0].fresh(0)[0], folders, line, rank)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as aside:
        out = found.save(Path(aside, "out"))
        places = [out] if len(folders) == 1 else [out / name for name in found.names]
        scores = [before_and_after(task, place) for task, place in zip(tasks, places)]
    before, after = (f"{statistics.mean(each):.3f}" for each in zip(*scores))
    return line, rank, found.count(), found.error, before, after, seconds


def rows_of(
    tasks: Sequence[Task], folders: Sequence[Path], lines: list[tuple[str, int]]
) -> Iterator[Row]:
    """The LoRAs themselves, no update, and every compression."""
    scores = [before_and_after(task, folder) for task, folder in zip(tasks, folders)]
    before, after = (f"{statistics.mean(each):.3f}" for each in zip(*scores))
    bare = statistics.mean(map(without_update, tasks, folders))
    count = len(folders) * 6 * 4 * RANK * 2 * 384
    yield "LoRA itself", RANK, count, 0.0, before, after, 0.0
    yield "no update", "", 0, 1.0, f"{bare:.3f}", "", 0.0
    for line, rank in lines:
        row = compressed(tasks, folders, line, rank)
        print(row, flush=True)
        yield row


def table(rows: Iterator[Row]) -> str:
    """A table in Markdown."""
    head = "| to | rank | parameters | relative error | accuracy | after more training | seconds |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for line, rank, count, error, before, after, seconds in rows:
        what = f"`{line}`" if seconds else line
        lines.append(
            f"| {what} | {rank} | {count:,} | {error:.3f} | {before} | {after} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def large(folder: Path) -> str:
    """Compress random numbers in the shape of a LoRA of Llama-2-7B; say how long it took."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    sides = {
        f"base_model.model.model.layers.{layer}.self_attn.{role}_proj.lora_{side}.weight": torch.randn(
            size
        )
        for layer in range(32)
        for role in "qkvo"
        for side, size in (("A", (16, 4096)), ("B", (4096, 16)))
    }
    folder.mkdir()
    save_file(sides, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32})
    )
    del sides
    begin = time.process_time()
    found = lortalib.nn.compress(config, folder, "cp", 32, tolerance=0.0)
    seconds, peak = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        "Random numbers in the shape of a LoRA of rank 16 on q, k, v, o of Llama-2-7B "
        f"({found.original_count():,} parameters), to cp of rank 32 ({found.count():,}): 100 sweeps took "
        f"{seconds:.0f} s of processor time on {torch.get_num_threads()} thread(s), and the process at most "
        f"{peak / 2**20:.1f} GiB. Random numbers have nothing in common, so the relative error is "
        f"{found.error:.4f}."
    )


def main() -> None:
    """Run everything and write the page."""
    with tempfile.TemporaryDirectory() as aside:
        size = large(Path(aside, "large"))  # first, as its peak is that of the process
        tasks = parts()
        folders = [train_lora(task, k, Path(aside, f"part{k}")) for k, task in enumerate(tasks)]
        sections = {
            "One LoRA": table(rows_of(tasks[:1], folders[:1], ALONE)),
            "Three LoRAs in one tensor": table(rows_of(tasks, folders, TOGETHER)),
            "Size": size,
        }
    about = (
        f"Written by `compress.py`. LoRAs of PEFT of rank {RANK} on q, k, v, o of all-MiniLM-L6-v2, each "
        f"trained for {STEPS} steps of {BATCH} film reviews out of a third of the rows. *Accuracy* is over "
        f"600 test rows (standard error about 0.017), *after more training* that after {MORE} further steps. "
        "One seed."
    )
    text = [f"# Compressing LoRAs\n\n{about}"]
    text += [f"## {title}\n\n{section}" for title, section in sections.items()]
    OUT.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
