"""verify() on wrong plans: each is caught, for the right reason."""

from dataclasses import replace

import pytest
from models import Attention, words
from torch import nn
from verify_cases import (
    CASES,
    ShuffledPairs,
    check,
    exchanged,
    laid_out,
    made,
    random,
    shuffled,
    sound,
    split,
)

from lortalib.nn import FeatureRows, UnsupportedModelError, sites, verify
from lortalib.nn._anatomy.rules import contiguous, per_head

WRONG = [
    *((name, exchanged("q", "k"), "its queries do not come from", "q k exchanged")
      for name in ("bert", "gpt2", "deberta", "deberta_v2", "wavlm", "siglip", "bloom")),
    ("bert", exchanged("k", "v"), "its keys do not come from", "k v exchanged"),
    ("bert", shuffled("q"), "query head 1 meets head 0 of its keys", "q shuffled"),
    ("bert", shuffled("o"), "query head 0 meets head 1 of its output", "o shuffled"),
    ("gpt2", shuffled("v"), "query head 0 meets head 1 of its values", "v shuffled"),
    ("wavlm", shuffled("o"), "query head 0 meets head 1 of its output", "o shuffled"),
    ("bert", shuffled("qkvo"), "its heads stand in the order 1, 0, 2, 3", "all shuffled"),
    ("llama", shuffled("k", ShuffledPairs), "query head 0 meets head 1 of its keys", "kv shuffled"),
    ("olmo2", shuffled("q"), "query head 1 meets head 0 of its output", "coupled q shuffled"),
    ("gpt_neox", laid_out(contiguous), "planned as k of layer 0 and v of layer 0", "contiguous"),
    ("bloom", laid_out(contiguous), "planned as k of layer 0 and v of layer 0", "contiguous"),
    ("codegen", laid_out(contiguous), "planned as k of layer 0 and v of layer 0", "contiguous"),
    ("gpt2", laid_out(per_head), "planned as k of layer 0 and v of layer 0", "per head"),
    *((name, split(factor), "one head has the components", f"heads times {factor}")
      for name in ("bert", "gpt2", "wavlm", "olmo2") for factor in (0.5, 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "reason"), [w[:3] for w in WRONG], ids=[f"{w[0]} {w[3]}" for w in WRONG]
)
def test_wrong_plans_are_caught(name, change, reason):
    report = check(name, change)
    assert not report.ok
    assert not report.complete
    assert any(reason in found for found in report.disagreements), report
    with pytest.raises(UnsupportedModelError, match=reason):
        report.raise_for_disagreement()


def test_interleaved_key_value_groups_are_caught():
    """Query heads 0 to 3 with key heads 0, 1, 0, 1 in the plan, 0, 0, 1, 1 in the model."""

    def interleave(plan):
        class Interleaved(FeatureRows):
            def index(self, device=None):
                return super().index(device).reshape(4, 4)[[0, 2, 1, 3]].reshape(-1)

        rows = Interleaved(0, ((16, 1),))
        return [replace(s, rows=rows, fused=16) if s.role in "qo" else s for s in plan]

    report = check("llama", interleave)
    assert any("its heads stand in the order 0, 2, 1, 3" in text for text in report.disagreements)
    assert any("query head 2 meets head 0 of its keys" in text for text in report.disagreements)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("role", "word"), [*zip("qkvo", ("queries", "keys", "values", "output"))])
def test_a_missing_role_is_noticed(name, role, word):
    report = check(name, lambda plan: [site for site in plan if site.role != role])
    assert report.ok
    assert not report.complete
    assert all(f"its {word}" in text for stack in report.stacks for text in stack.missed)
    assert f"not confirmed: layer 0: its {word}" in str(report)


def test_a_missing_block_is_noticed():
    report = check("llama", lambda plan: [site for site in plan if site.layer == 0])
    assert report.ok
    assert not report.complete
    (call,) = report.unplanned
    assert "in layers.1.self_attn" in call
    assert call in str(report)


def test_a_planned_block_that_is_not_run_is_noticed():
    model = made("t5")
    report = verify(model.encoder, words(), sites=sites(model.encoder))
    assert report.complete
    embedded = {"inputs_embeds": random(2, 5, 16), "encoder_outputs": (random(2, 7, 16),)}
    report = verify(model, {"decoder_inputs_embeds": embedded.pop("inputs_embeds"), **embedded})
    assert report.ok
    assert not report.complete
    assert [stack.unseen for stack in report.stacks] == [(0, 1), (), ()]


def test_a_projection_that_is_not_used_is_noticed():
    """The values are those of layer 0 in both layers."""
    model = CASES["llama"].model()
    plan = [replace(s, path=s.path.replace("v_proj", "o_proj"), writer=False)
            if s.role == "v" and s.layer else s for s in sites(model)]  # fmt: skip
    report = verify(model, words(), sites=[s for s in plan if s.role != "o" or not s.layer])
    assert any("takes part in no attention call" in text for text in report.disagreements)


def test_weights_that_are_read_directly_unknown_to_the_plan_are_noticed():
    model = CASES["wavlm"].model()
    report = verify(
        model, sound(), sites=[replace(s, weight_read_directly=False) for s in sites(model)]
    )
    assert not report.ok
    assert "attention without planned sites: in encoder.layers.0.attention" in str(report)
    assert "planned, but not called: encoder.layers.0.attention.q_proj" in str(report)


def test_a_plan_that_leaves_the_projection_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"the q of encoder\.layer\.0\S* has feature 31"
    ):
        check("bert", lambda plan: [replace(site, head_dim=8) for site in plan])


def test_a_model_without_attention_calls_confirms_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return x

    report = verify(Idle(), random(2, 5, 16))
    assert not report.ok
    assert report.stacks[0].unseen == (0,)
    assert "no attention call was seen for layers 0" in str(report)
    with pytest.raises(UnsupportedModelError, match="No attention call of a planned site was seen"):
        report.raise_for_disagreement()
