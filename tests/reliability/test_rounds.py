"""Whole lives of adapters, one after another on one model: nothing of them stays in memory.

Long: ``LORTALIB_ROUNDS=200`` (see docs/reliability.md).
"""

import gc
import os
from pathlib import Path

import peft
import psutil
import pytest
import torch
from adapted import bits, put
from models import FAMILIES, words

import lortalib
from lortalib.peft import LortaConfig

ROUNDS = int(os.environ.get("LORTALIB_ROUNDS", "6"))
#: How much the process may grow over all rounds but the first ones.
MEGABYTES = 24

#: One on the weights takes about a megabyte, as do its gradients and its pairs: many would show.
KINDS = {
    "weights": {"decomposition": "lora", "rank": 64},
    "stream": {"decomposition": "indscal", "rank": 64, "acts_on": "stream"},
}


def llama():
    return FAMILIES["Llama"].model(
        "ForCausalLM", hidden_size=64, intermediate_size=96, num_hidden_layers=4
    )


class Memory:
    """Tensors that came since, and the memory of the process, after each round."""

    def __init__(self):
        gc.collect()
        gc.freeze()  # what is counted is what came since
        self.tensors, self.bytes, self.resident = [], [], []

    def look(self):
        gc.collect()
        found = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        self.tensors.append(len(found))
        self.bytes.append(sum(tensor.nbytes for tensor in found))
        self.resident.append(psutil.Process().memory_info().rss / 2**20)

    def grown(self):
        """What grew after the first rounds, in which caches are filled, as text; empty if nothing did."""
        first = max(2, len(self.tensors) // 4)
        more = self.resident[-1] - min(self.resident[first - 1 : first + 3])
        print(
            f"{len(self.tensors)} rounds: {self.tensors[first]} tensors of {self.bytes[first]:,} bytes after "
            f"round {first + 1}, {self.tensors[-1]} of {self.bytes[-1]:,} after the last; "
            f"process {more:+.1f} MB"
        )
        flat = len({*self.tensors[first:]}) == len({*self.bytes[first:]}) == 1
        return "" if flat and more < MEGABYTES else f"{self.tensors}, {self.bytes}, {more:+.1f} MB"


@pytest.fixture
def memory():
    return Memory()


def train(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = words()["input_ids"]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def generate(model):
    model.generate(**words(), max_new_tokens=3, do_sample=False)


def weights(model):
    return {name: bits(p) for name, p in model.named_parameters() if "lorta" not in name}


def one_life(model, kind, folder):
    adapter = put(model, targets="all", alpha=0.1, train_also=["lm_head"], **KINDS[kind])
    train(model)
    generate(model)
    adapter.save(folder)
    adapter.merge()
    generate(model)
    adapter.unmerge()
    generate(model)
    adapter.disable()
    adapter.remove()
    lortalib.nn.load(model, folder).remove()


def one_life_in_a_bank(model, kind, folder):
    options = {**KINDS[kind], "targets": "all"}
    adapter = put(model, **options)
    bank = lortalib.nn.bank(model, capacity=1, **options)
    bank.update({"one": adapter, "two": adapter})
    adapter.remove()
    with bank.using(["one", "two"]):
        generate(model)
    del bank["one"]
    bank.remove()


def one_life_twice_at_once(model, kind, folder):
    """Two adapters, of which the second is merged while the first is away, and removed out of order."""
    first = put(model, name="first", targets="all", **KINDS[kind])
    train(model)
    first.disable()
    second = put(model, name="second", targets="qv", seed=1, **KINDS[kind])
    second.merge()
    generate(model)
    first.remove()
    second.remove()


LIVES = {"alone": one_life, "bank": one_life_in_a_bank, "two": one_life_twice_at_once}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("life", LIVES)
def test_nothing_stays_of_an_adapter(life, kind, tmp_path, memory):
    model = llama()
    before = weights(model)
    for _ in range(ROUNDS):
        LIVES[life](model, kind, Path(tmp_path))
        memory.look()
        after = weights(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
        del after
    assert not memory.grown()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_of_an_adapter_that_peft_deleted(kind, memory):
    def config():
        return LortaConfig(target_modules=["q_proj", "v_proj", "o_proj"], **KINDS[kind])

    model = peft.get_peft_model(llama(), config())
    for _ in range(ROUNDS):
        model.add_adapter("next", config())
        model.set_adapter("next")
        train(model)
        generate(model)
        model.merge_adapter(["next"])
        generate(model)
        model.unmerge_adapter()
        model.set_adapter("default")
        model.delete_adapter("next")
        memory.look()
    assert not memory.grown()
