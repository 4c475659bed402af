"""How many rows a forward has, whatever the order and the names of its arguments."""

import pytest
import torch
from banks import filled, prompts, rows_of, small_llama
from models import FAMILIES, Stored
from torch import nn
from transformers import LongformerConfig, LongformerModel

import lortalib


class Masked(nn.Module):
    """A model whose arguments have names of their own, the batch among the last."""

    def __init__(self):
        super().__init__()
        self.inner = Stored()

    def forward(self, mask, places=None, *, states=None, **rest):
        return self.inner(next(x for x in (states, *rest.values()) if x is not None))


class Ordered(nn.Module):
    """A model whose first argument has the batch."""

    def __init__(self):
        super().__init__()
        self.inner = Stored()

    def forward(self, states, table=None):
        return self.inner(states)


def test_a_batch_that_the_rows_do_not_divide_is_refused():
    model = small_llama()
    bank = filled(model)
    with pytest.raises(
        ValueError, match="named 3 rows, but the model was called with a batch of 2"
    ):
        rows_of(model, bank, [0, 1, 2], prompts(2))
    with pytest.raises(ValueError, match="needs a name"):
        rows_of(model, bank, [], prompts(2))


def test_attention_with_time_before_batch_is_refused():
    config = LongformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attention_window=[4], vocab_size=30,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not see the batch as rows"):
        lortalib.nn.bank(LongformerModel(config))


def test_the_batch_is_told_whatever_the_order_of_the_arguments():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    ids = inputs["input_ids"]
    wanted = rows_of(model, bank, [1, 2], inputs)
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    for given in (
        {"position_ids": places, "input_ids": ids},
        {"attention_mask": mask, "input_ids": ids},
        {"position_ids": places, "inputs_embeds": model.get_input_embeddings()(ids)},
    ):
        torch.testing.assert_close(rows_of(model, bank, [1, 2], given), wanted)
    with pytest.raises(ValueError, match=r"named 3 rows, but .* a batch of 2"):
        rows_of(model, bank, [1, 2, 3], {"labels": ids.expand(2, 5), "input_ids": ids})


def test_the_batch_of_arguments_of_unknown_names():
    model = Masked().eval()
    bank = filled(model)
    x = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(1))
    wanted = rows_of(model, bank, [1, 2], {"mask": x[:1, :1], "states": x})
    for given in (
        {"states": x, "mask": x[:1, None]},
        {"mask": x[:1, :, 0], "places": x[:3, 0], "extra": x},
        {"mask": x[:1, :1], "places": torch.arange(6), "states": x},
    ):
        torch.testing.assert_close(rows_of(model, bank, [1, 2], given), wanted)
    with bank.using([1, 2, 3]), pytest.raises(ValueError, match=r"named 3 rows, but .* batch of 4"):
        model(x, states=x)
    with torch.no_grad(), bank.using([1, 2]):
        torch.testing.assert_close(model(x[:1], x[:3, 0], states=x)[0], wanted)
        # A name of transformers tells more than the order.
        torch.testing.assert_close(model(x[:, 0], inputs_embeds=x[1:3])[0], wanted[1:3])
    model = Ordered().eval()
    bank = filled(model)
    with torch.no_grad(), bank.using([1, 2]):
        wanted = model(x[:2])[0]
        torch.testing.assert_close(model(table=x, states=x[:2])[0], wanted)
        torch.testing.assert_close(model(x[:2], x)[0], wanted)
    with bank.using([1, 2, 3]), pytest.raises(ValueError, match=r"named 3 rows, but .* batch of 4"):
        model(x)


def test_the_batch_belongs_to_one_forward():
    model, inputs = small_llama(), prompts()
    bank = filled(model)
    twice = {"input_ids": inputs["input_ids"].repeat_interleave(2, 0)}
    with torch.no_grad():
        with bank.using([1, 2]):
            wanted = model.model(**inputs)[0]
        with bank.using([1, 2]):
            model(**twice)
            torch.testing.assert_close(model.model(**inputs)[0], wanted)
            with pytest.raises(ValueError, match="a batch of 3"):
                model(input_ids=twice["input_ids"][:3])
            torch.testing.assert_close(model.model(**inputs)[0], wanted)


def test_an_encoder_is_called_by_itself_behind_a_generation_with_beams():
    model, inputs = FAMILIES["T5"].model("ForConditionalGeneration"), FAMILIES["T5"].inputs()
    bank = filled(model)
    ids = inputs["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["decoder_start_token_id"] = 0
    with bank.using([1, None]):
        first, second = (model.generate(ids, **options) for _ in range(2))
    assert torch.equal(first, second)


def test_one_text_is_not_taken_for_its_letters():
    bank = filled(small_llama())
    with pytest.raises(TypeError, match="found the text 'ann'"), bank.using("ann"):
        pass
