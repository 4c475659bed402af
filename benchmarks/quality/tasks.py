"""The tasks of the study: real weights, real data, one small number that says how well it went.

Every task has rows to train on, rows on which the learning rate is chosen (``validation``), and
rows that are only looked at for the tables (``test``); the division is the same for every method
and seed. A seed decides the order of the rows, the new classifier, and the adapter's start.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import assets

#: Log-probabilities of the preference pairs under the base, which take a minute to find.
KNOWN = Path(__file__).parents[2] / "runs" / "quality" / "preferences.pt"
#: Modules with the output projections beside q, k, v: the same sites for every method.
BERT = r".*attention\.(self\.(query|key|value)|output\.dense)"
LLAMA = r".*self_attn\.[qkvo]_proj"


@dataclass
class Task:
    """Rows of token ids, a base model, a loss and a score.

    Args:
        name: of the task.
        metric: name of the score.
        better: 1 if a higher score is better, else -1.
        steps: of training.
        batch: rows of a step.
        sites: PEFT's ``target_modules``, the attention projections q, k, v, o.
        validation: number of rows to choose the learning rate on.
        test: number of rows for the tables.
        train: number of rows to train on; all that are left if there are fewer.
        title: what the tables call it.
        seeds: how many are run at the rate that was chosen.
        looks: how often a training looks at the validation rows; its result is then the best of what
            it saw there, and it ends where `fitting.PATIENCE` looks found nothing better. With 0 its
            result is what the last step left.
    """

    name: str
    metric: str
    better: int
    steps: int
    batch: int
    sites: str
    validation: int
    test: int
    train: int
    title: str
    seeds: int = 2
    looks: int = 0
    rows: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    #: Class of transformers that makes the base.
    kind: ClassVar[Any]

    def folder(self) -> Path:
        """Of the base."""
        raise NotImplementedError

    def fresh(self, seed: int) -> tuple[nn.Module, list[str]]:
        """A copy of the base, and the names of its new modules, which every method trains."""
        raise NotImplementedError

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError

    def measure(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, float]:
        """The metric, and ``loss``, over rows."""
        raise NotImplementedError

    def load(self) -> list[Any]:
        """All rows, in the order of the source."""
        raise NotImplementedError

    def divided(self) -> dict[str, list[Any]]:
        """Rows by part."""
        if not self.rows:
            rows = self.load()
            random.Random(0).shuffle(rows)
            last = self.validation + self.test
            self.rows = {
                "validation": rows[: self.validation],
                "test": rows[self.validation : last],
                "train": rows[last : last + self.train],
            }
        return self.rows

    def batches(self, seed: int) -> Iterator[list[Any]]:
        """The batches of one training: the rows again and again, each time in a new order.

        Rows of like length are together: of eight batches at a time, which spares padding.
        """
        draw, rows, queue = random.Random(seed), list[Any](), list[list[Any]]()
        for _ in range(self.steps):
            if not queue:
                while len(rows) < 8 * self.batch:
                    again = list(self.divided()["train"])
                    draw.shuffle(again)
                    rows += again
                some, rows = sorted(rows[: 8 * self.batch], key=self.size), rows[8 * self.batch :]
                queue = [some[at : at + self.batch] for at in range(0, len(some), self.batch)]
                draw.shuffle(queue)
            yield queue.pop()

    def size(self, row: Any) -> int:
        """Tokens of a row."""
        return len(row[0])

    def last_sites(self, count: int) -> str:
        """`sites` of the last layers alone.

        Args:
            count: how many layers.
        """
        found = base(self.kind, self.folder()).config.num_hidden_layers
        numbers = "|".join(str(layer) for layer in range(found - count, found))
        return rf".*layers?\.({numbers})\." + self.sites.removeprefix(".*")

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> dict[str, float]:
        """Mean metric and loss over a part."""
        model.eval()
        rows = sorted(self.divided()[part], key=self.size)
        total: dict[str, float] = {}
        for start in range(0, len(rows), 4 * self.batch):
            some = rows[start : start + 4 * self.batch]
            for name, value in self.measure(model, some).items():
                total[name] = total.get(name, 0.0) + value
        return self.summary(total, len(rows))

    def summary(self, total: dict[str, float], count: int) -> dict[str, float]:
        """The scores, from sums over all rows."""
        return {name: value / count for name, value in total.items()}


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@cache
def tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


@cache
def base(kind: Any, folder: Path) -> nn.Module:
    """The model of a folder, which is never changed."""
    # The fused attention of CPUs is slow going backwards over rows as short as these.
    found: nn.Module = kind.from_pretrained(folder, attn_implementation="eager")
    return found


@dataclass
class Classes(Task):
    """A sentence or a protein in one of two classes."""

    kind = AutoModelForSequenceClassification

    def fresh(self, seed: int) -> tuple[nn.Module, list[str]]:
        """The base with a classifier drawn by the seed."""
        model = copy.deepcopy(base(self.kind, self.folder()))
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
        return model, ["classifier"]

    def logits(self, model: nn.Module, rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(rows, 2) logits and the labels."""
        ids, mask = padded([row for row, _ in rows], 0)
        found = model(input_ids=ids, attention_mask=mask).logits.float()
        return found, torch.tensor([label for _, label in rows])

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """Cross entropy."""
        return cross_entropy(*self.logits(model, rows))

    def measure(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, float]:
        """Accuracy and loss, summed."""
        logits, labels = self.logits(model, rows)
        right = (logits.argmax(-1) == labels).sum()
        both = ((logits.argmax(-1) == 1) & (labels == 1)).sum()
        return {
            "accuracy": float(right),
            "loss": float(cross_entropy(logits, labels, reduction="sum")),
            "said": float((logits.argmax(-1) == 1).sum()),
            "are": float(labels.sum()),
            "both": float(both),
        }

    def summary(self, total: dict[str, float], count: int) -> dict[str, float]:
        """Accuracy, Matthews' correlation and loss."""
        said, are, both = (total[name] / count for name in ("said", "are", "both"))
        spread = math.sqrt(said * (1 - said) * are * (1 - are))
        return {
            "accuracy": total["accuracy"] / count,
            "MCC": (both - said * are) / spread if spread else 0.0,
            "loss": total["loss"] / count,
        }


@dataclass
class Reviews(Classes):
    """Language understanding: sentences of film reviews, for or against; all-MiniLM-L6-v2."""

    def folder(self) -> Path:
        """Of MiniLM."""
        return assets.minilm()

    def load(self) -> list[Any]:
        """Ids of at most 48 tokens, and the label."""
        words = tokenizer(self.folder())
        texts, labels = zip(*assets.film_reviews())
        ids = words(list(texts), truncation=True, max_length=48)["input_ids"]
        return list(zip(ids, labels))


@dataclass
class Peptides(Classes):
    """Protein: is a peptide antimicrobial; AntiBERTy, which knew antibodies alone."""

    def folder(self) -> Path:
        """Of AntiBERTy."""
        return assets.antiberty()

    def load(self) -> list[Any]:
        """Ids of peptides of at most 40 residues, and the label."""
        words = tokenizer(self.folder())
        kept = [(p, label) for p, label in assets.peptides() if len(p) <= 40]
        ids = words([" ".join(p) for p, _ in kept])["input_ids"]
        return [(row, label) for row, (_, label) in zip(ids, kept)]


@dataclass
class Language(Task):
    """Continuations under SmolLM2-135M-Instruct: a row is (ids, length of the prompt, ...)."""

    kind = AutoModelForCausalLM

    def folder(self) -> Path:
        """Of SmolLM2."""
        return assets.smollm2()

    def fresh(self, seed: int) -> tuple[nn.Module, list[str]]:
        """The base; nothing new is in it."""
        return copy.deepcopy(base(self.kind, self.folder())), []

    def likelihood(self, model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """(rows,) log-probability of each continuation; logits are made there alone."""
        ids, mask = padded([row for row, _ in rows], 0)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        places = torch.arange(1, ids.shape[1])
        prompts = torch.tensor([prompt for _, prompt in rows])
        chosen = mask[:, 1:].bool() & (places >= prompts[:, None])
        logits = model.lm_head(hidden[chosen]).float()
        each = -cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
        return torch.zeros(len(rows)).index_add(0, chosen.nonzero()[:, 0], each)


@dataclass
class Answers(Language):
    """Instruction tuning: short questions and answers, the loss on the answer alone."""

    def load(self) -> list[Any]:
        """Ids in the chat template and the length of the prompt, one row for a question."""
        words, rows = tokenizer(self.folder()), []
        # One answer to each question: the same question never is in two parts.
        for question, answer in dict(assets.conversations()).items():
            turn = [{"role": "user", "content": question}]
            told = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            prompt = words(told)["input_ids"]
            ids = prompt + words(f"{answer}<|im_end|>")["input_ids"]
            if len(ids) <= 80:
                rows.append((ids, len(prompt)))
        return rows

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """Mean negative log-likelihood of a token of the answers."""
        return -self.likelihood(model, rows).sum() / sum(len(ids) - at for ids, at in rows)

    def measure(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, float]:
        """Nats, and the tokens they are of."""
        return {
            "loss": -float(self.likelihood(model, rows).sum()),
            "tokens": float(sum(len(ids) - at for ids, at in rows)),
        }

    def summary(self, total: dict[str, float], count: int) -> dict[str, float]:
        """Nats a token."""
        return {"loss": total["loss"] / total["tokens"]}


@dataclass
class Preferences(Language):
    """Preference optimisation (DPO): sentences that people rated as positive over negative ones."""

    beta: float = 0.1

    def load(self) -> list[Any]:
        """A chosen and a rejected row, each with its log-probability under the base."""
        words = tokenizer(self.folder())
        prompt = words("My opinion of this product:")["input_ids"]
        rated = [
            (words(f" {text}")["input_ids"][:32], value) for text, value in assets.rated_sentences()
        ]
        good = [(prompt + ids, len(prompt)) for ids, value in rated if value > 1.2]
        bad = [(prompt + ids, len(prompt)) for ids, value in rated if value < -1.2]
        draw = random.Random(0)
        draw.shuffle(good)
        draw.shuffle(bad)
        pairs = sorted(zip(good, bad), key=self.size)
        if not KNOWN.exists():
            model, values = base(self.kind, self.folder()), list[float]()
            with torch.no_grad(), autocast():
                for start in range(0, len(pairs), 16):
                    rows = [row for pair in pairs[start : start + 16] for row in pair]
                    values += self.likelihood(model, rows).tolist()
            KNOWN.parent.mkdir(parents=True, exist_ok=True)
            torch.save(values, KNOWN)
        values = torch.load(KNOWN)
        return [(*pair, *both) for pair, both in zip(pairs, zip(values[::2], values[1::2]))]

    def size(self, row: Any) -> int:
        """Tokens of the longer one."""
        return max(len(ids) for ids, _ in row[:2])

    def rewards(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """(rows,) margin of the rewards, beta times the log-ratio to the base."""
        values = self.likelihood(model, [pick for row in rows for pick in row[:2]])
        before = torch.tensor([row[2:] for row in rows])
        gain = values.view(-1, 2) - before
        return self.beta * (gain[:, 0] - gain[:, 1])

    def loss(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """DPO's (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
        return -logsigmoid(self.rewards(model, rows)).mean()

    def measure(self, model: nn.Module, rows: Sequence[Any]) -> dict[str, float]:
        """Reward accuracy, margin and loss, summed."""
        margin = self.rewards(model, rows)
        return {
            # The base prefers neither: where nothing has moved, half of the pairs count.
            "accuracy": float((margin > 0).sum() + 0.5 * (margin == 0).sum()),
            "margin": float(margin.sum()),
            "loss": float(-logsigmoid(margin).sum()),
        }


def autocast() -> torch.autocast:
    """bfloat16 where torch holds it to be safe; factors and optimiser stay float32."""
    return torch.autocast("cpu", torch.bfloat16)


def until_it_stops(task: Task) -> Task:
    """The same task with four passes over the rows that its one pass sees, the best checkpoint kept."""
    return dataclasses.replace(
        task,
        name=f"{task.name}, to the end",
        title=f"{task.title}, until validation stops improving",
        train=min(task.train, task.steps * task.batch),
        steps=4 * task.steps,
        looks=8,
        rows={},
    )


_SPLIT = {"sites": BERT, "validation": 1000, "test": 2000, "train": 4000}
_ONE_PASS = (
    Reviews(
        "reviews", "accuracy", 1, 120, 32, title="film reviews, all-MiniLM-L6-v2", seeds=3, **_SPLIT
    ),
    Peptides(
        "peptides", "accuracy", 1, 80, 16, BERT, 500, 1200, 4000,
        title="antimicrobial peptides, AntiBERTy", seeds=3,
    ),
    Answers(
        "answers", "loss", -1, 36, 6, LLAMA, 100, 200, 2000,
        title="short answers, SmolLM2-135M-Instruct",
    ),
    Preferences(
        "preferences", "accuracy", 1, 24, 6, LLAMA, 100, 220, 400,
        title="rated sentences (DPO), SmolLM2-135M-Instruct",
    ),
)  # fmt: skip
_LONG = Reviews(
    "reviews, long", "accuracy", 1, 360, 32, title="film reviews, three times the steps", **_SPLIT
)
#: By name: one pass, four passes, and what the first edition of the study called long.
TASKS: dict[str, Task] = {
    task.name: task for task in (*_ONE_PASS, *map(until_it_stops, _ONE_PASS), _LONG)
}
