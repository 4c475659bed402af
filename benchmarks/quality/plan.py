"""What the study runs, in which order; `study.py --write-plan` writes it to plan.md."""

from __future__ import annotations

from collections.abc import Iterator

from methods import Method
from tasks import TASKS


def lorta(kind: str, rank: int, start: int = -4, label: str = "", **settings: object) -> Method:
    """A format of lortalib."""
    name = label or f"lortalib {SHOWN.get(kind, kind)} r{rank}"
    return Method(name, "lortalib", start, kind, {"rank": rank, **settings})


def hf(label: str, kind: str, start: int, **settings: object) -> Method:
    """A method of HF PEFT, with its defaults where nothing is said."""
    return Method(f"PEFT {label}", "peft", start, f"{kind}Config", settings)


SHOWN = {
    "cp": "CP",
    "tucker": "Tucker",
    "tt": "TT",
    "lotr": "LoTR",
    "cara": "CaRA",
    "indscal": "stream INDSCAL",
    "rescal": "stream RESCAL",
}

ENDS = [Method("frozen base", "frozen", 0), Method("full fine-tuning", "full", -9)]
#: Compared on every task, the first first.
MAIN = [
    lorta("cp", 16),
    hf("LoRA r8", "Lora", -5, r=8),
    hf("LoRA r1", "Lora", -5, r=1),
    lorta("cp", 64),
    lorta("tt", 8),
    lorta("lotr", 8, -5),
    hf("VeRA r128", "Vera", -4, r=128),
    hf("FourierFT 300", "FourierFT", -3, n_frequency=300),
    hf("LoKr r4", "LoKr", -5, r=4),
    hf("VB-LoRA", "VBLoRA", -4, r=1, num_vectors=60, vector_length=64),
    hf("TinyLoRA u64", "TinyLora", -4, u=64),
    hf("LoHa r1", "LoHa", -5, r=1),
    lorta("tucker", 6),
    lorta("lotr", 16, -5),
    lorta("tt", 16),
    lorta("cp", 4),
    hf("MiSS r1", "Miss", -5, r=1),
]
#: Where a run is cheap, on the reviews.
MORE = [
    hf("LoRA r2", "Lora", -5, r=2),
    hf("LoRA r4", "Lora", -5, r=4),
    hf("LoRA r1, q and v", "Lora", -5, r=1, target_modules=["query", "value"]),
    hf("LoRA r1, q", "Lora", -5, r=1, target_modules=["query"]),
    hf("FourierFT 1000", "FourierFT", -3, n_frequency=1000),
    hf("UniLoRA 4096", "UniLora", -4, theta_d_length=4096),
    hf("IA3", "IA3", -4),
    hf("HRA r1", "HRA", -5, r=1),
    hf("WaveFT 300", "WaveFT", -4, n_frequency=300),
    hf("DoRA r1", "Lora", -5, r=1, use_dora=True),
    hf("DeLoRA r1", "Delora", -5, r=1),
    hf("SHiRA r1", "Shira", -6, r=1),
    hf("RoAd", "Road", -4),
    hf("LN tuning", "LNTuning", -4, target_modules=r".*LayerNorm"),
    lorta("metatt_4d", 8),
    lorta("fact_tk", 8),
    lorta("cara", 16),
    lorta("ring", 4),
    lorta("cp", 42),
]
#: One thing about CP r16 is another; on the reviews and, where it means something, on peptides.
CHOICES = [
    lorta("in r, out r, head r, layer r (zero), matrix r", 16, label="CP r16: layer starts at zero"),
    lorta("cp", 16, label="CP r16: gradient start", init="gradient"),
    lorta(
        "cp", 16, label="CP r16: layer, head, matrix 3 times faster",
        speeds={"layer": 3.0, "head": 3.0, "matrix": 3.0},
    ),
    lorta("cp", 16, -5, label="CP r16: alpha 4", alpha=4.0),
    lorta("cp", 16, -4, label="CP r16: alpha 1/4", alpha=0.25),
    lorta("cp", 16, -3, label="CP r16: published start", init="lorta", alpha=16.0),
    lorta("published side", 16, label="CP r16: published head side"),
    lorta("cp", 16, label="CP r16: q and v", targets="qv"),
    lorta("cp", 3, label="CP r3: attention and MLP", targets="all"),
    lorta(
        "layer in r, layer out r, layer head r, layer matrix r", 3,
        label="CP r3: a tensor for each layer",
    ),
    lorta(
        "matrix in r, matrix out r, matrix head r, matrix layer r", 4,
        label="CP r4: a tensor for each matrix",
    ),
    lorta("in r (zero), out r, head r, layer r, matrix r", 16, label="CP r16: in starts at zero"),
    lorta("in r (frozen), layer matrix head out r", 1, label="LoRA r1 with one frozen in"),
]  # fmt: skip
#: Directions from the gradient of the first batches (HOSVD); the zero parameter is the core.
CORES = "lora_xs"
LOCAL = "layer matrix in p (frozen), layer matrix p q (zero), head out q"
TUCKER = "in p, head h, out q, layer l, matrix m, p h q l m (zero)"
ALIGNED = [
    lorta(CORES, 17, label="LoRA-XS r17: gradient start", init="gradient"),
    lorta(LOCAL, 11, label="LoTR r11, local frozen in: gradient start", init="gradient"),
    lorta(TUCKER, [5, 6, 6, 6, 4], label="Tucker r5, 6, 6, 6, 4: gradient start", init="gradient"),
]
WIDER = [
    lorta(LOCAL, 17, label="LoTR r17, local frozen in: gradient start", init="gradient"),
    lorta(
        TUCKER,
        [10, 9, 10, 10, 4],
        label="Tucker r10, 9, 10, 10, 4: gradient start",
        init="gradient",
    ),
]
#: As many networks as matrices: what CHOICES found best of the reviews, on the other tasks.
BY_MATRIX = "matrix in r, matrix out r, matrix head r, matrix layer r"
APART = [
    lorta(BY_MATRIX, 2, label="CP r2: a tensor for each matrix"),
    lorta(BY_MATRIX, 5, label="CP r5: a tensor for each matrix"),
    lorta(BY_MATRIX, 16, label="CP r16: a tensor for each matrix"),
]
#: Ranks that fill a twentieth of LoRA r8's parameters, of formats that were best where they were above it
#: or far below it.
FULL = [
    lorta("lotr", 15, -5),
    lorta(CORES, 20, label="LoRA-XS r20: gradient start", init="gradient"),
]
RANDOM = [lorta(CORES, 17, label="LoRA-XS r17: random start")]
#: Grouped queries: on the answers.
GROUPED = [lorta("cp", 8, label="CP r8: split", gqa="split")]
#: Three times the steps.
LONG = [
    ENDS[0], MAIN[1], MAIN[0], MAIN[2], MAIN[3],
    next(m for m in MAIN if m.label == "lortalib LoTR r16"),
]  # fmt: skip
#: Second edition: what fills a twentieth of LoRA r8's parameters of each base. Tensors on the residual
#: stream, the best additive formats, and the rivals of that size or as near to it as they come.
STREAM = {"acts_on": "stream"}
ANY_SIZE = [next(m for m in MORE if m.label == "PEFT HRA r1"), hf("LoKr r2", "LoKr", -5, r=2)]
MINILM = [
    lorta("indscal", 18, **STREAM), MAIN[0], CHOICES[10],
    hf("LoRA r1, last 2 layers", "Lora", -5, r=1, last_layers=2),
    hf("UniLoRA 7372", "UniLora", -4, theta_d_length=7372),
    lorta("rescal", 13, **STREAM), *ANY_SIZE,
]  # fmt: skip
ANTIBERTY = [
    lorta("indscal", 24, **STREAM), lorta("cp", 21), APART[1],
    hf("LoRA r1, last 3 layers", "Lora", -5, r=1, last_layers=3),
    hf("UniLoRA 13107", "UniLora", -4, theta_d_length=13107),
    lorta("rescal", 15, **STREAM), *ANY_SIZE,
]  # fmt: skip
SMOLLM2 = [
    lorta("indscal", 66, **STREAM), MAIN[3], APART[2],
    hf("LoRA r1, last 12 layers", "Lora", -5, r=1, last_layers=12),
    hf("UniLoRA 46080", "UniLora", -4, theta_d_length=46080),
    lorta("rescal", 17, **STREAM), *ANY_SIZE,
]  # fmt: skip
TWENTIETH = {"reviews": MINILM, "peptides": ANTIBERTY, "answers": SMOLLM2, "preferences": SMOLLM2}
FIRST = [*ENDS, *MAIN, *MORE, *CHOICES, *APART, *ALIGNED, *WIDER, *FULL, *RANDOM, *GROUPED]
METHODS = list({m.label: m for m in (*FIRST, *MINILM, *ANTIBERTY, *SMOLLM2)}.values())


def first_edition() -> Iterator[tuple[str, str]]:
    """Pairs of task and method: what every task shares first, task by task in turn."""
    short = list(TWENTIETH)
    for method in (*ENDS[:1], *MAIN[:6]):
        yield from ((name, method.label) for name in short)
    small = ("PEFT LoRA r1, q", "PEFT LoRA r1, q and v", "lortalib CP r42")
    yield from (("reviews", label) for label in small)
    yield from (("reviews, long", method.label) for method in LONG)
    yield from (("reviews", method.label) for method in CHOICES)
    other = [name for name in short if name != "reviews"]
    yield from ((name, "CP r4: a tensor for each matrix") for name in other)
    yield "peptides", APART[1].label
    yield from ((name, m.label) for name in other[1:] for m in (APART[2], WIDER[0]))
    yield from ((name, ALIGNED[0].label) for name in short)
    yield from ((name, method.label) for method in MAIN[6:12] for name in short[:2])
    yield "reviews, long", "CP r4: a tensor for each matrix"
    yield from (("answers", method.label) for method in GROUPED)
    yield from ((name, method.label) for method in MAIN[6:12] for name in short[2:])
    yield from ((name, ALIGNED[1].label) for name in short)
    yield from ((name, ENDS[1].label) for name in short)
    yield from (("reviews", method.label) for method in RANDOM)
    yield from ((name, ALIGNED[2].label) for name in short)
    yield from ((name, WIDER[1].label) for name in other[1:])
    for method in MAIN[12:]:
        yield from ((name, method.label) for name in short)
    yield from (("reviews", method.label) for method in MORE if method.label not in small)
    yield from (("peptides", method.label) for method in CHOICES[:7])
    yield from ((name, FULL[0].label) for name in other[1:])
    yield "peptides", FULL[1].label
    yield from ((name, "PEFT UniLoRA 4096") for name in other)
    yield from ((name, APART[0].label) for name in short[:2])


def second_edition() -> Iterator[tuple[str, str]]:
    """A twentieth of LoRA r8's parameters in two regimes, the bounds and the most telling methods first."""
    long = {task: f"{task}, to the end" for task in TWENTIETH}
    for task, methods in TWENTIETH.items():
        yield task, methods[0].label
    for task, methods in TWENTIETH.items():
        for method in (MAIN[1], methods[0], methods[1], ENDS[0]):
            yield long[task], method.label
    for task in TWENTIETH:
        yield long[task], MAIN[2].label
    for place in range(1, len(MINILM)):
        for task, methods in TWENTIETH.items():
            yield task, methods[place].label
            yield long[task], methods[place].label


PLAN = list(dict.fromkeys([*first_edition(), *second_edition()]))


def text(longest: int) -> str:
    """The plan as a page.

    Args:
        longest: how many rates a search has at most.
    """
    from fitting import HEAD_RATE, PATIENCE, WARM

    lines = [
        "# Plan of the runs",
        "",
        "Written by `study.py --write-plan` before the runs, kept as it was run.",
        "",
        "Every method adapts q, k, v, o of every layer unless its name says otherwise, with AdamW without",
        "weight decay, gradients clipped at norm 1, a rate that rises for "
        f"{WARM:.0%} of the steps and falls as a cosine,",
        f"and bfloat16 autocast. A new classifier learns at {HEAD_RATE:g} in every method. Methods of PEFT",
        "have PEFT's defaults where nothing is said. The learning rate is 10^(k/2); the search starts at k,",
        "with seed 0, takes both neighbours, goes on while an end is best by the loss on validation rows (at",
        f"most {longest} rates), then runs the other seeds. A rate is as good as the mean over its seeds, so",
        "one that fails with one seed gives way to its neighbour. Test rows do not decide any rate.",
        "",
        "A first try of ten pairs was thrown away: it chose rates by accuracy, which varies too much, and",
        "its batches were not sorted by length, so that a third of the work was padding.",
        "",
        "Changed after 36 pairs, for every method, those that had been run too: the rate had been chosen",
        "with seed 0 alone, and three searches ended at one with which the other seed diverged (LoTR r8, CP",
        "r42 and, in the longer training, CP r16). Added then, having tried them by hand on the reviews: the",
        "methods with a gradient start but for CP's. Full fine-tuning moved forward. After 52 pairs a tensor",
        "for each matrix, the best of the choices on the reviews, went to the front of all other tasks.",
        "After 119 pairs: LoTR r16 had been best on the preferences with 1/18.8 of LoRA r8's parameters, and",
        "LoRA-XS on the peptides with 1/28, so that ranks which fill a twentieth were added at the end; and",
        "a third seed for every method on the two classifiers, whose runs are cheap. After 127 pairs:",
        "UniLoRA on the other tasks, because on the reviews it did best for its parameters, and beside it a",
        "tensor for each matrix of rank 2. These additions, and what went forward after 52 pairs, came of",
        "test scores. Third seeds were run first for the methods then ahead; few others have one.",
        "",
        "Second edition: a twentieth of LoRA r8's parameters in two regimes. One pass, as before. *To the",
        "end*: four passes over the rows of one pass, eight looks at the validation rows, the checkpoint",
        f"with the lowest loss there is the result, {PATIENCE} looks without a better one end the training;",
        "the same for all. There the rate below the start is always run: a training that diverged has the",
        "loss of its beginning (added after nine pairs, for all). Ranks were set by size alone before the",
        "runs, the largest that fit a twentieth;",
        "methods of PEFT that cannot be that small have their smallest useful rank.",
        "",
        "| task | steps | rows of a step | rows: train, validation, test | seeds | metric |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for task in TASKS.values():
        sizes = ", ".join(f"{len(task.divided()[p]):,}" for p in ("train", "validation", "test"))
        lines.append(
            f"| {task.name}: {task.title} | {task.steps} | {task.batch} | {sizes} | {task.seeds} "
            f"| {task.metric} |"
        )
    lines += ["", "| # | task | method | k at the start |", "|---:|---|---|---:|"]
    by_label = {method.label: method for method in METHODS}
    for number, (name, label) in enumerate(PLAN, 1):
        method = by_label[label]
        start = "" if method.library == "frozen" else str(method.start)
        lines.append(f"| {number} | {name} | {label} | {start} |")
    return "\n".join(lines) + "\n"
