"""Defines the forms of answers: OpenAI's completions and chat completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Piece:
    """A part of an answer: new text, all tokens so far, and in the last piece why it ended."""

    text: str
    tokens: list[int]
    reason: str | None = None


class Completions:
    """The form of answers to /v1/completions.

    Attributes:
        length: the largest number of new tokens where the request names none; None for all that fit.
    """

    length: int | None = 16

    def whole(self, piece: Piece) -> dict[str, Any]:
        """Return the whole answer."""
        choice = {"text": piece.text, "token_ids": piece.tokens, "finish_reason": piece.reason}
        return {"object": "text_completion", "choices": [{"index": 0, **choice}]}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return a part of a streamed answer."""
        choice = {"text": piece.text, "finish_reason": piece.reason}
        return {"object": "text_completion", "choices": [{"index": 0, **choice}]}


class ChatCompletions(Completions):
    """The form of answers to /v1/chat/completions."""

    length = None

    def whole(self, piece: Piece) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": piece.text}
        choice = {"index": 0, "message": message, "finish_reason": piece.reason}
        return {"object": "chat.completion", "choices": [choice]}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return a part of a streamed answer."""
        delta = {"role": "assistant", "content": piece.text}
        choice = {"index": 0, "delta": delta, "finish_reason": piece.reason}
        return {"object": "chat.completion.chunk", "choices": [choice]}
