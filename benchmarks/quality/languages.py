"""Twenty-four users of one model: adapters of their own, on shared sides, and compressed together.

    nice python benchmarks/quality/languages.py

Each user wants the English messages of Sphinx, a program, in another language. The rows are the catalogues
that Sphinx ships; messages of the test are in no training row of any language. SmolLM2-135M learns them with

* CP adapters, each with all parameters of its own,
* CP adapters on the sides ``in`` and ``out`` of one that was trained on half of the languages, whose other
  parameters start anew, or from those of that one,
* LoRAs of PEFT, and what `lortalib.nn.compress` makes of all of them together.

Learning rates are chosen on two further languages. The score is the loss of a token of the translation. What
is done is kept in ``runs/quality/languages``, so a run goes on where it was killed; languages_table.py writes
languages.md and languages.json from it. Forty minutes of one core.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from messages import Row, assets, batches, catalogues, rows_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import lortalib

RUNS = Path(__file__).parents[2] / "runs" / "quality" / "languages"
USERS, SEARCHED = 24, ("it", "de")
#: Steps of one training, and of the training of the sides.
STEPS, SIDE_STEPS = 20, 80
RATES = {
    "own": (3e-3, 1e-2, 3e-2, 1e-1),
    "shared": (3e-2, 1e-1, 3e-1),
    "continued": (1e-2, 3e-2, 1e-1),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
}
RANK, LORA_RANK = 32, 8
SIDES = ("in", "out")
JOINT = "layer matrix in p{own}, {adapter}layer matrix p q, layer matrix head out q{own}"
LLAMA = r".*self_attn\.[qkvo]_proj"
#: What the LoRAs are compressed to: the line, its rank, and the line of one adapter in a bank.
COMPRESSED = {
    "CP": ("cp", 64, "cp"),
    "joint diagonalisation": (
        JOINT.format(own="", adapter="adapter "), 16, JOINT.format(own=" (shared)", adapter=""),
    ),
}  # fmt: skip


def base() -> Any:
    """A fresh base."""
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def loss(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Losses of all tokens of the translations."""
    width = max(len(ids) for ids, _ in rows)  # what is right of the end changes nothing before it
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    places = torch.arange(width - 1)
    asked = torch.stack([(places >= start - 1) & (places < len(i) - 1) for i, start in rows])
    states = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1][asked]
    logits = model.get_output_embeddings()(states)
    return cross_entropy(logits.float(), ids[:, 1:][asked], reduction="none")


def learn(model: nn.Module, rows: Iterator[Sequence[Row]], rate: float, steps: int) -> None:
    """Train what requires gradients."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    model.train()
    for _, batch in zip(range(steps), rows):
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
    model.eval()


def score(model: nn.Module, language: str) -> float:
    """Mean loss of a token of the test rows."""
    with torch.no_grad():
        return loss(model, rows_of(language)["test"]).mean().item()


def train_cp(
    languages: Sequence[str], rate: float, steps: int, folder: Path, **options: Any
) -> Any:
    """Train a CP adapter made with further options; return the model with it."""
    model = base()
    draw = torch.Generator().manual_seed(0)
    adapter = lortalib.nn.apply(model, "cp", RANK, generator=draw, **options)
    learn(model, batches(languages), rate, steps)
    adapter.save(folder)
    return model


def train_lora(language: str, rate: float, folder: Path) -> Any:
    """Train a LoRA of PEFT; return the model with it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=LLAMA)
    model = peft.get_peft_model(base(), config)
    learn(model, batches([language]), rate, STEPS)
    model.save_pretrained(folder)
    return model


class Study:
    """What is known so far; everything is computed once."""

    def __init__(self) -> None:
        RUNS.mkdir(parents=True, exist_ok=True)
        self._file = RUNS / "known.jsonl"
        self.languages = list(catalogues())[:USERS]

    def known(self) -> dict[str, Any]:
        """What was computed; another process may add to it."""
        if not self._file.exists():
            return {}
        return dict(map(json.loads, self._file.read_text("utf-8").splitlines()))

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what is known under a key, computed if it is not."""
        known = self.known()
        if key in known:
            return known[key]
        found = compute()
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps([key, found]) + "\n")
        print(key, found, flush=True)
        return found

    def sides(self) -> Path:
        """The adapter whose sides the users share."""
        folder = RUNS / "sides"

        def train() -> str:
            train_cp(self.languages[::2], self.rate("own"), SIDE_STEPS, folder, shared=SIDES)
            return "trained"

        self.once("sides", train)
        return folder

    def train(self, how: str, language: str, rate: float) -> float:
        """Train one adapter and score it."""
        folder = RUNS / how / language
        if how == "lora":
            model = train_lora(language, rate, folder)
        else:
            options: dict[str, Any] = {}
            if how != "own":
                options["shared"] = donor = lortalib.nn.load(base(), self.sides())
                if how == "continued":
                    options["init"] = donor
            model = train_cp([language], rate, STEPS, folder, **options)
        return score(model, language)

    def rate(self, how: str) -> float:
        """The learning rate that is best in two languages that are no user's."""
        losses = {}
        for rate in RATES[how]:
            each = [
                self.once(f"{how} at {rate}: {name}", lambda n=name, r=rate: self.train(how, n, r))
                for name in SEARCHED
            ]
            losses[rate] = statistics.fmean(each)
        return min(losses, key=losses.__getitem__)

    def without(self, language: str) -> float:
        """Score the base alone."""
        return score(base(), language)

    def with_one_for_all(self, language: str) -> float:
        """Score the adapter that was trained on half of the languages."""
        model = base()
        lortalib.nn.load(model, self.sides())
        return score(model, language)

    def trained(self) -> None:
        """Train and score the adapters of every user."""
        for language in self.languages:
            self.once(f"base: {language}", lambda n=language: self.without(n))
            self.once(f"one for all: {language}", lambda n=language: self.with_one_for_all(n))
            for how in RATES:
                self.once(
                    f"{how}: {language}", lambda n=language, h=how: self.train(h, n, self.rate(h))
                )

    def compressed(self, title: str) -> dict[str, Any]:
        """Compress all LoRAs together, put them into a bank, and score them there."""
        line, rank, alone = COMPRESSED[title]
        model = base()
        folders = {name: RUNS / "lora" / name for name in self.languages}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ranks that short modes cannot fill are cut
            found = lortalib.nn.compress(model.config, folders, line, rank, sweeps=30)
        with tempfile.TemporaryDirectory() as aside:
            saved = found.save(Path(aside, "all"))
            file_bytes = file_size(saved / self.languages[0])
        bank = lortalib.nn.bank(model, alone, rank, shared=SIDES, dtype=torch.bfloat16)
        bank.update({name: found.adapter(name) for name in found.names})
        scores = {}
        for name in found.names:
            with bank.using([name]):
                scores[name] = score(model, name)
        joint = sum(  # what has no leg for the adapters
            tensor.numel()
            for network in found.networks.values()
            for term, tensor in zip(network.legs.terms, network.stored)
            if found.mode not in term.legs
        )
        return {
            "scores": scores,
            "error": found.error,
            "own": (found.count() - joint) // len(scores),
            "joint": joint,
            **sizes(bank),
            "file bytes": file_bytes,
        }

    def stored(self, how: str) -> dict[str, Any]:
        """Put the adapters of one kind into a bank, and weigh them."""
        model = base()
        if how == "lora":
            bank = lortalib.nn.bank(model, "lora", LORA_RANK, gqa="split", dtype=torch.bfloat16)
            for name in self.languages[:2]:
                adapter = lortalib.nn.load_lora(model, RUNS / how / name)
                bank[name] = adapter
                adapter.remove()
        else:
            shared = () if how == "own" else SIDES
            bank = lortalib.nn.bank(model, "cp", RANK, shared=shared, dtype=torch.bfloat16)
            bank.update({name: RUNS / how / name for name in self.languages[:2]})
        joint = sum(p.numel() for each in bank.shared.values() for p in each)
        return {
            "own": bank.count(),
            "joint": joint,
            **sizes(bank),
            "file bytes": file_size(RUNS / how / self.languages[0]),
        }


def sizes(bank: lortalib.nn.Bank) -> dict[str, int]:
    """Bytes of one adapter in a bank, and of what all share there."""
    return {
        "bank bytes": bank.count() * bank.dtype.itemsize,
        "shared bytes": sum(p.nbytes for each in bank.shared.values() for p in each),
    }


def file_size(folder: Path) -> int:
    """Bytes of the file of an adapter."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Run what is not known yet."""
    study = Study()
    study.trained()
    for how in RATES:
        study.once(f"stored {how}", lambda h=how: study.stored(h))
    for title in COMPRESSED:
        study.once(f"compressed {title}", lambda t=title: study.compressed(t))


if __name__ == "__main__":
    main()
