"""How the server of lortalib.serve draws tokens, and how it divides an answer into pieces of text."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lortalib.serve import Engine, Request, Server, _engine


@given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=6),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
    st.integers(0, 9),
)
def test_draws_are_from_the_fewest_likeliest_tokens(logits, temperature, top_p, seed):
    request = Request([0], temperature=temperature, top_p=top_p, seed=seed)
    logits = torch.tensor(logits, dtype=torch.float64)
    chances = (logits / temperature).softmax(-1).tolist()
    total, allowed = 0.0, []
    for token in sorted(range(len(chances)), key=chances.__getitem__, reverse=True):
        if total < top_p - 1e-9:
            allowed.append(token)
        total += chances[token]
    least = min(chances[token] for token in allowed)
    for _ in range(20):
        assert chances[int(request.scores(logits).argmax())] >= least - 1e-9


@pytest.mark.parametrize("temperature", [1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature, top_p):
    request = Request([0], temperature=temperature, top_p=top_p, seed=0)
    assert int(request.scores(torch.tensor([1.0, 2.0, -3.0, 0.0])).argmax()) == 1


def test_draws_have_the_chances_of_the_softmax():
    request = Request([0], temperature=2.0, top_p=0.95, seed=0)
    logits = torch.tensor([3.0, 1.0, 2.0, -9.0], dtype=torch.float64)
    drawn = torch.stack([request.scores(logits).argmax() for _ in range(4000)])
    wanted = (logits[:3] / 2).softmax(-1)  # the last has less than one hundredth
    found = drawn.bincount(minlength=4) / len(drawn)
    assert (found[:3] - wanted).abs().max() < 4 * 0.5 / len(drawn) ** 0.5
    assert found[3] == 0
    half = Request([0], top_p=0.5, seed=0)  # the first token has it, so the other is never drawn
    assert len({int(half.scores(torch.zeros(2)).argmax()) for _ in range(20)}) == 1
    assert Request([0], temperature=0).scores(logits) is logits


def test_scores_are_not_rounded_to_the_dtype_of_the_model(monkeypatch):
    monkeypatch.setattr(_engine, "_is_of_engine", lambda: True)
    engine, logits = Engine.__new__(Engine), torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    drawn = [(Request([0], seed=0), SimpleNamespace(has_new_token=True))]
    engine._context, engine._batch = None, lambda: drawn
    output = engine._leave(None, (), {"logits_to_keep": 1}, SimpleNamespace(logits=logits))
    wanted = Request([0], seed=0).scores(logits[0, 0].float())
    assert torch.equal(output.logits[0, 0], wanted.float())


class Texts:
    """A tokenizer whose tokens are letters, of which a text has several."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join("ab"[token] for token in tokens)


@example(tokens=[0, 1], stop=["b", "ab"])
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_pieces_end_where_the_first_stop_text_begins(tokens, stop):
    server = Server.__new__(Server)
    server.tokenizer = Texts()
    updates = ((tokens[: k + 1], k + 1 == len(tokens)) for k in range(len(tokens)))
    pieces = list(server._pieces(Request([0], length=len(tokens)), updates, stop))
    text = server.tokenizer.decode(tokens)
    ends = [k for k in range(len(text)) for each in stop if text[:k].endswith(each)]
    ends += [len(text)] * any(text.endswith(each) for each in stop)
    seen = text[: min(ends)] if ends else text  # no token after the first stop text is seen
    wanted = min((seen.index(each) for each in stop if each in seen), default=len(text))
    assert "".join(piece.text for piece in pieces) == text[:wanted]
    assert pieces[-1].reason == ("stop" if ends else "length")
    assert all(piece.reason is None for piece in pieces[:-1])


class Bytes:
    """A tokenizer whose tokens are bytes, of which a letter can have several."""

    def decode(self, tokens, skip_special_tokens=False):
        assert skip_special_tokens
        return bytes(tokens).decode(errors="replace")


def test_pieces_have_whole_letters_and_say_why_they_end():
    server = Server.__new__(Server)
    server.tokenizer, tokens = Bytes(), list("aé€b".encode())
    for longer, reason in ((0, "length"), (1, "stop")):  # of which an end token, which is not seen
        updates = ((tokens[: k + 1], k + 1 == len(tokens)) for k in range(len(tokens)))
        pieces = list(server._pieces(Request([0], length=len(tokens) + longer), updates, []))
        assert [piece.text for piece in pieces] == ["a", "é", "€", "b"]
        assert [piece.reason for piece in pieces] == [None, None, None, reason]
