"""Pretrained models and real text, from the packages that ship them."""

import copy

import pytest
import torch
from adapted import close, output, put, same_bits
from strategies import generator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lortalib
from lortalib.nn import load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def minilm(asset):
    folder = asset("minilm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2(asset):
    folder = asset("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def test_minilm_learns_film_reviews(minilm, asset, tmp_path):
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    texts, labels = zip(*asset("film_reviews")[::540])
    assert sum(labels) == len(labels) / 2 == 8
    options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
    batch = {**tokenizer(list(texts), **options)}
    before = output(model, batch)
    adapter = lortalib.nn.apply(
        model, "cp", rank=4, train_also=["classifier"], generator=generator()
    )
    assert same_bits(output(model, batch), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**batch, labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    trained = output(model, batch)
    adapter.save(tmp_path)
    other = copy.deepcopy(minilm[0])
    load(other, tmp_path).merge()
    assert close(output(other, batch), trained, 1e-4)
    adapter.remove()
    assert same_bits(output(model, batch), before)


def test_minilm_by_head_count(minilm):
    model = copy.deepcopy(minilm[0])
    adapter = lortalib.nn.apply(model, "cp", rank=8)
    assert adapter.count() == 8 * (384 + 32 + 12 + 6 + 4)
    assert len(adapter.sites) == 24


TEXTS = ["The capital of France is", "Once upon a time there was a small"]


def generate(model, batch):
    """Twenty tokens, greedily."""
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def prompts(smollm2):
    """For one text and for two, the second padded on the left: the batch, and what follows it."""
    model, tokenizer = smollm2
    batches = [tokenizer(TEXTS[:n], padding=True, return_tensors="pt") for n in (1, 2)]
    assert [(batch["attention_mask"] == 0).any().item() for batch in batches] == [False, True]
    return [(batch, generate(model, batch)) for batch in batches]


@pytest.mark.parametrize(("number", "gqa"), [(1, "split"), (2, "pool")])
def test_smollm2_generates_the_same_adapted_and_merged(smollm2, prompts, number, gqa):
    model, (batch, of_base) = smollm2[0], prompts[number - 1]
    weight = model.model.layers[3].self_attn.k_proj.weight
    before = weight.detach().clone()
    adapter = put(model, rank=4, gqa=gqa, alpha=0.5)
    try:
        adapted = generate(model, batch)
        assert (adapted != of_base).any(dim=1).all()
        adapter.merge()
        assert not same_bits(weight, before)
        assert torch.equal(generate(model, batch), adapted)
    finally:
        adapter.remove()
    assert same_bits(weight, before)


def test_smollm2_with_and_without_its_cache(smollm2):
    """Token by token with key/value cache, the logits are those of the whole text at once."""
    model, tokenizer = smollm2
    ids = tokenizer("A low-rank tensor is a", return_tensors="pt")["input_ids"]
    adapter = put(model, rank=4, alpha=0.5)
    try:
        whole = output(model, {"input_ids": ids})
        cache, steps = None, []
        for position in range(ids.shape[1]):
            with torch.no_grad():
                step = model(input_ids=ids[:, position : position + 1], past_key_values=cache)
            cache = step.past_key_values
            steps.append(step.logits)
        assert close(torch.cat(steps, dim=1), whole, 1e-3)
    finally:
        adapter.remove()
