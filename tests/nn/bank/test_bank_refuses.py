"""What a bank refuses, with the reason; it then holds what it held."""

import copy

import numpy
import pytest
import torch
from adapted import close, put
from banks import constant, filled, small_llama
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lortalib


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model = small_llama()
    bank = filled(model)
    before = {k: bank[k] for k in bank}
    other = put(small_llama(), rank=3)
    lotr = put(small_llama(), "lotr", 2)
    some = put(small_llama(), targets="q")
    beside = put(small_llama(), train_also=["lm_head"])
    nan = {name: [t * float("nan") for t in ts] for name, ts in bank[0].items()}
    for source, why in (
        (other, "tensors of the shapes"),
        (lotr, "has the legs"),
        (some, "other projections"),
        (beside, "trains whole modules"),
        (nan, "NaN or infinity"),
        ({}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.update({0: bank[1], "x": source})
    with pytest.raises(ValueError, match="None stands for rows"):
        bank.add(None, bank[0])
    for k, groups in before.items():
        assert all(torch.equal(a, b) for g in groups for a, b in zip(groups[g], bank[k][g]))
    assert "x" not in bank


def test_wrong_arguments_are_refused():
    for options in ({"capacity": 0}, {"alpha": 0.0}, {"capacity": 1.5}, {"alpha": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            lortalib.nn.bank(small_llama(), "cp", 2, **options)


def test_values_that_the_dtype_cannot_hold_are_refused():
    for dtype, value in (
        (torch.float16, 7e4),
        (torch.float8_e4m3fn, 500.0),  # a cast would clip it
        (torch.float32, float("inf")),
        (torch.float64, float("-inf")),
        (torch.bfloat16, float("nan")),
    ):
        bank = lortalib.nn.bank(small_llama(), "cp", 2, dtype=dtype)
        good = {name: [torch.ones_like(t).float() for t in ts] for name, ts in bank[None].items()}
        bad = copy.deepcopy(good)
        bad["layers"][1].view(-1)[2] = value
        stack = {name: [torch.stack(each) for each in zip(good[name], bad[name])] for name in good}
        for call in (
            lambda: bank.add("bad", bad),  # noqa: B023
            lambda: bank.update({"good": good, "bad": bad}),  # noqa: B023
            lambda: bank.fill(["good", "bad"], stack),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="adapter 'bad' holds NaN or infinity in group"):
                call()
        assert len(bank) == 0
        bank["good"] = good


def test_tensors_that_are_missing_or_are_none_are_refused():
    bank = lortalib.nn.bank(small_llama(), "cp", 2)
    good = bank[None]
    for tensors, why in (
        ({"layers": []}, "found none"),
        ({"layers": good["layers"][:-1]}, "has tensors of the shapes"),
        ({**good, "other": good["layers"]}, "found 'other'"),
        ({"layers": [t.to("meta") for t in good["layers"]]}, "on meta"),
        ({"layers": [t.cfloat() for t in good["layers"]]}, "complex64"),
        ({"layers": [t.numpy() for t in good["layers"]]}, "found ndarray"),
    ):
        with pytest.raises(ValueError, match=why):
            bank["x"] = tensors
        stack = {name: [t[None] for t in ts] for name, ts in tensors.items()}
        with pytest.raises(ValueError, match=why):
            bank.fill(["x"], stack)
    with pytest.raises(TypeError, match="found int"):
        bank["x"] = 3
    assert len(bank) == 0


def test_names_are_new_for_fill():
    bank = lortalib.nn.bank(small_llama(), "cp", 2)
    bank["old"] = bank[None]
    two = {name: [t.expand(2, *t.shape) for t in ts] for name, ts in bank[None].items()}
    for names, why in (
        (["new", "new"], "'new' is there twice"),
        (["new", "old"], "'old' is in the bank already"),
        (["new", None], "None stands for rows"),
    ):
        with pytest.raises(ValueError, match=why):
            bank.fill(names, two)
    assert list(bank) == ["old"]
    bank.fill([], {name: [t[:0] for t in ts] for name, ts in two.items()})
    bank.update({})
    assert list(bank) == ["old"]


def test_another_gqa_is_another_shape():
    model = small_llama()
    pooled, split = (
        put(small_llama(), "lora", 2, targets="kv", gqa=gqa) for gqa in ("pool", "split")
    )
    bank = lortalib.nn.bank(model, "lora", 2, targets="kv")
    bank["pooled"] = pooled
    with pytest.raises(ValueError, match="does not fit the bank"):
        bank["split"] = split
    with pytest.raises(ValueError, match="the other bank does not fit"):
        lortalib.nn.bank(small_llama(), "lora", 2, targets="kv", gqa="split").update(bank)


def test_contexts_of_no_list_of_names_or_of_no_rows_are_refused():
    bank = filled(small_llama())
    for names in (None, 3, torch.tensor(3), numpy.array(3)):
        with pytest.raises(TypeError, match="a name, or None, for every row of the batch; found"):
            bank.using(names).__enter__()
    with bank.using(numpy.array([3, 1])):
        pass
    for lead in ((0,), ()):
        with (
            pytest.raises(ValueError, match=r"the shapes|found 0 rows"),
            bank.using_tensors(constant(bank, 1, *lead)),
        ):
            pass


def test_pictures_whose_row_is_not_known_are_refused():
    """Row 0 has three pictures and row 1 has one, so halves of the four are not those of the rows."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    seeing = CLIPVisionConfig(intermediate_size=64, image_size=8, patch_size=4, **sizes)
    reading = LlamaConfig(intermediate_size=64, vocab_size=70, **sizes)
    config = LlavaConfig(
        vision_config=seeing, text_config=reading, image_token_id=69, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config).eval()
    bank = lortalib.nn.bank(model, "cp", 2)
    adapter = put(model, "cp", 2)
    bank["ann"] = adapter
    adapter.remove()
    texts = torch.full((2, 14), 5)
    texts[0, :12] = texts[1, :4] = 69
    pictures = torch.randn(4, 3, 8, 8)
    with (
        bank.using(["ann", None]),
        pytest.raises(ValueError, match=r"4 pictures .* batch of 2"),
    ):
        model(input_ids=texts, pixel_values=pictures)
    with bank.using(["ann"]):  # all are of one row
        alone = model(input_ids=texts[:1], pixel_values=pictures[:3]).logits
    whole = torch.full((2, 6), 5)
    whole[:, :4] = 69
    with bank.using(["ann", None]):  # one picture for each row
        both = model(input_ids=whole, pixel_values=pictures[:2]).logits
    with bank.using(["ann"]):
        first = model(input_ids=whole[:1], pixel_values=pictures[:1]).logits
    assert close(both[:1], first)
    assert alone.isfinite().all()
