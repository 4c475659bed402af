"""verify(): the plan of sites against the arithmetic of live models; wrong plans stand apart."""

from dataclasses import replace

import pytest
import torch
import transformers
from adapted import output, put, unchanged
from models import Attention, words
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from verify_cases import CASES, check, exchanged, made, random, shuffled, sound

from lortalib.nn import FeatureRows, sites, verify


@pytest.mark.parametrize("name", CASES)
def test_right_plans_are_confirmed(name):
    case, model = CASES[name], made(name).eval()
    output(model, case.inputs())  # some models note down sizes of their inputs
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with unchanged(model):
        report = verify(model, case.inputs())
    assert report.ok, report
    assert report.complete, report
    report.raise_for_disagreement()
    assert torch.equal(torch.get_rng_state(), state)
    checked, agreed, coupled = (
        sum(getattr(stack, name) for stack in report.stacks)
        for name in ("checked", "agreed", "coupled")
    )
    assert (checked, agreed, coupled) == (case.heads, case.heads - case.coupled, case.coupled)


# Whatever the arithmetic


class Written(nn.Module):
    """One attention, written in one of many ways."""

    def __init__(self, way, norm=nn.Identity):
        super().__init__()
        self.attention = Attention(shape=(4, 4, 3, 16))
        self.attention.forward = None
        self.norm, self.way = norm(), way

    def forward(self, x):
        block = self.attention
        heads = (p(x).unflatten(-1, (4, 3)) for p in (block.q_proj, block.k_proj, block.v_proj))
        return x + block.o_proj(self.way(*map(self.norm, heads)).flatten(-2))


def by_einsum(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def by_einsum_with_dots(q, k, v):
    scores = torch.einsum("...qhd,...khd->...hqk", q, k)
    return torch.einsum("... h q k, ... k h d -> ... q h d", functional.softmax(scores, -1), v)


def transposed(q, k, v):
    q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))  # (batch, heads, components, tokens)
    weights = (k.mT @ q).softmax(-2)  # keys, queries
    return (v @ weights).permute(0, 3, 1, 2)


def merged_batch(q, k, v):
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(len(q), 5, 5), q, k.mT, alpha=0.1)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 4)).transpose(1, 2)


def heads_first(q, k, v):
    q, k, v = (t.permute(2, 0, 1, 3).flatten(0, 1) for t in (q, k, v))
    return torch.bmm((q @ k.mT).softmax(-1), v).unflatten(0, (4, -1)).permute(1, 2, 0, 3)


def head_by_head(q, k, v):
    mixed = [(q[:, :, h] @ k[:, :, h].mT).softmax(-1) @ v[:, :, h] for h in range(4)]
    return torch.stack(mixed, 2)


def query_blocks(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    parts = [functional.scaled_dot_product_attention(part, k, v) for part in q.split(2, 2)]
    return torch.cat(parts, 2).transpose(1, 2)


def heads_among_queries(q, k, v):
    """One key head for all: the queries of all heads in one matrix, as GPT-BigCode once had it."""
    k, v = k[:, :, 0], v[:, :, 0]
    return ((q.flatten(1, 2) @ k.mT).softmax(-1) @ v).unflatten(1, (-1, 4))


def masked_in_place(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.zeros(len(q), 4, 5, 5)
    scores[:, :, :, :] = q @ k.mT
    scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    scores = scores - scores.amax(-1, keepdim=True)
    with torch.no_grad():
        weights = functional.softmax(scores, dim=-1, dtype=torch.float64).to(v.dtype)
        return (weights @ v).transpose(1, 2)


def saturated(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, scale=1e6).transpose(1, 2)


WAYS = (by_einsum, by_einsum_with_dots, transposed, merged_batch, heads_first, head_by_head,
        query_blocks, masked_in_place, saturated)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attention_is_seen_however_it_is_written(way):
    model = Written(way)
    plan = sites(model)
    report = verify(model, random(2, 5, 16))
    assert report.complete, report
    assert report.stacks[0].agreed == 16
    for change in (exchanged("q", "k"), exchanged("k", "v"), shuffled("q"), shuffled("o")):
        assert verify(model, random(2, 5, 16), sites=change(plan)).disagreements


def test_heads_can_hide_among_the_queries():
    model = Written(heads_among_queries)
    plan = [
        replace(site, heads=1, rows=FeatureRows(0, ((3, 1),)), fused=12)
        if site.role in "kv"
        else site
        for site in sites(model)
    ]
    report = verify(model, random(2, 5, 16), sites=plan)
    assert report.complete, report
    assert report.stacks[0].agreed == 4 + 1 + 1 + 4
    assert not verify(model, random(2, 5, 16), sites=shuffled("q")(plan)).ok
    assert not verify(model, random(2, 5, 16)).complete


def test_norms_inside_heads_do_not_couple_them():
    report = verify(Written(by_einsum, lambda: nn.LayerNorm(3)), random(2, 5, 16))
    assert report.complete
    assert report.stacks[0].coupled == 0


@pytest.mark.parametrize("inputs", [random(1, 1, 16), (random(2, 3, 16),), {"x": random(1, 2, 16)}])
def test_few_tokens_and_any_form_of_inputs_will_do(inputs):
    assert verify(Written(by_einsum), inputs).complete


# The state of the model


@pytest.mark.parametrize("name", ["llama", "wavlm", "siglip"])
def test_a_model_in_training_is_given_back_as_it_was(name):
    model = CASES[name].model().train()
    frozen = list(model.parameters())[::2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    next(model.children()).eval()
    with unchanged(model), torch.no_grad():
        assert verify(model, CASES[name].inputs()).complete


def test_a_failing_forward_leaves_nothing_behind():
    model = CASES["wavlm"].model().train()
    model.encoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    state = torch.get_rng_state()
    with unchanged(model), pytest.raises(ZeroDivisionError):
        verify(model, sound())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5", "wavlm", "siglip"])
def test_an_adapted_model_can_be_verified(name):
    model = CASES[name].model()
    adapter = put(model)
    with unchanged(model):
        assert verify(model, CASES[name].inputs()).complete
    adapter.merge()
    assert verify(model, CASES[name].inputs()).complete


def test_parametrized_weights_are_seen_through():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = CASES["wavlm"].model()
    for part in ("q_proj", "out_proj"):
        projection = getattr(model.encoder.layers[0].attention, part)
        parametrize.register_parametrization(projection, "weight", Doubled())
    with unchanged(model):
        assert verify(model, sound()).complete


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
def test_any_attention_implementation(kernel):
    model = CASES["llama"].model()
    model.set_attn_implementation(kernel)
    assert verify(model, words()).complete
    assert model.config._attn_implementation == kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype):
    assert verify(CASES["llama"].model().to(dtype), words()).complete


def test_meta_devices_cannot_be_run():
    with torch.device("meta"):
        model = CASES["bert"].model()
    with pytest.raises(ValueError, match="meta device"):
        verify(model, words())


def test_the_report_is_a_table():
    assert str(check("t5")).splitlines() == [
        "stack                    sites  calls  heads  agreed  coupled",
        "encoder                  8      2      32     32      0        confirmed",
        "decoder                  8      2      32     32      0        confirmed",
        "decoder.EncDecAttention  8      2      32     32      0        confirmed",
    ]


@pytest.mark.slow
def test_a_real_decoder(asset):
    model = transformers.AutoModelForCausalLM.from_pretrained(asset("smollm2"))
    report = verify(model, words())
    assert report.complete, report
    assert report.stacks[0].agreed == 30 * (9 + 3 + 3 + 9)


def test_a_real_encoder(asset):
    model = transformers.AutoModel.from_pretrained(asset("minilm"))
    report = verify(model, words())
    assert report.complete, report
    assert report.stacks[0].agreed == 6 * 4 * 12
