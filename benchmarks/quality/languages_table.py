"""The page of languages.py: scores, numbers and bytes of all contenders.

python benchmarks/quality/languages_table.py     writes languages.md and languages.json beside itself
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from languages import COMPRESSED, LORA_RANK, RANK, RATES, SIDE_STEPS, STEPS, USERS, Study
from messages import BATCH, TESTED

OUT = Path(__file__).with_name("languages.md")
#: What the table calls the contenders.
TITLES = {
    "base": "the base",
    "one for all": f"one CP adapter of rank {RANK} for all, trained on half of the languages",
    "own": f"CP of rank {RANK}, all its own",
    "shared": "CP on that one's sides, the rest anew",
    "continued": "CP on that one's sides, the rest from there",
    "lora": f"LoRA of rank {LORA_RANK}",
    **{
        title: f"all LoRAs compressed: {title}, rank {COMPRESSED[title][1]}" for title in COMPRESSED
    },
}


def losses(study: Study, contender: str) -> list[float]:
    """The score of every user."""
    known = study.known()
    if contender in COMPRESSED:
        return [known[f"compressed {contender}"]["scores"][name] for name in study.languages]
    return [known[f"{contender}: {name}"] for name in study.languages]


def mean_and_error(values: Sequence[float]) -> str:
    """The mean, with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def table(study: Study) -> str:
    """Scores, numbers and bytes of all contenders."""
    head = (
        "adapters", "loss", "minus that of the base", "minus that of CP of its own",
        "first half", "second half", "numbers of its own", "shared numbers", "bytes of its file",
        "bytes in a bank", "shared bytes there",
    )  # fmt: skip
    known, rows = study.known(), [head, ("---",) * len(head)]
    base_losses, own = losses(study, "base"), losses(study, "own")
    for contender, title in TITLES.items():
        found = losses(study, contender)
        sizes_ = known.get(f"compressed {contender}", known.get(f"stored {contender}", {}))
        keys = ("own", "joint", "file bytes", "bank bytes", "shared bytes")
        rows.append(
            (
                title,
                f"{statistics.fmean(found):.3f}",
                mean_and_error([a - b for a, b in zip(found, base_losses)])
                if contender != "base"
                else "",
                mean_and_error([a - b for a, b in zip(found, own)]) if contender != "own" else "",
                f"{statistics.fmean(found[::2]):.3f}",
                f"{statistics.fmean(found[1::2]):.3f}",
                *(f"{sizes_[key]:,.0f}" if key in sizes_ else "" for key in keys),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(study: Study) -> str:
    """The page with the table."""
    known = study.known()
    errors = ", ".join(
        f"{known[f'compressed {title}']['error']:.2f} ({title})" for title in COMPRESSED
    )
    rates = ", ".join(f"{study.rate(how):g} ({TITLES[how]})" for how in RATES)
    return f"""# Users of many languages

Written by `languages_table.py`. SmolLM2-135M-Instruct in bfloat16 translates messages of Sphinx into {USERS}
languages: {", ".join(study.languages)}.
Adapters on q, k, v, o, {STEPS} steps of {BATCH} messages each. *Loss*: nats of a token of the translation,
over up to {TESTED} messages that nobody trained on, mean over the languages. Differences are paired by
language, ± the standard error of their mean. *First half*: every second language, those that the sides were
trained on, for {SIDE_STEPS} steps together; *second half*: the others. In a bank, own numbers are in bfloat16
and shared ones in float32.

{table(study)}

Learning rates: {rates}. Relative error of the compressed updates: {errors}. One seed.
"""


def main() -> None:
    """Write both files."""
    study = Study()
    OUT.write_text(page(study), encoding="utf-8")
    OUT.with_suffix(".json").write_text(json.dumps(study.known(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
