"""Defines the server: OpenAI's completions and chat completions, every request with an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any

from .._kinds import Kind
from ._engine import BusyError, Engine
from ._forms import ChatCompletions, Completions, Piece
from ._http import AGAIN, HasGone, HttpError, JsonServer, take, take_number
from ._request import Request

BASE = "base"
ENGINE = Kind("an Engine", lambda value: isinstance(value, Engine))
#: How many connections there may be beside those of requests that wait.
_CONNECTIONS = 1024


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Find the token ids that end a completion: those of the model's generation and of the tokenizer.

    Args:
        model: a model of transformers that generates.
        tokenizer: its tokenizer.

    Raises:
        ValueError: neither names one.

    Example:
        >>> from types import SimpleNamespace as Of
        >>> end_tokens(Of(generation_config=Of(eos_token_id=[2, 7])), Of(eos_token_id=2))
        [2, 7]
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [named] if isinstance(named, int) else list(named or ())
    found = [each for each in (*ids, tokenizer.eos_token_id) if each is not None]
    if not found:
        raise ValueError(
            "neither the model's generation_config nor the tokenizer names a token that ends a text, so a "
            "completion has no end; set tokenizer.eos_token"
        )
    return list(dict.fromkeys(found))


class Server(JsonServer):
    """Answers OpenAI's completions and chat completions over HTTP, through an engine.

    The model ``base`` is the one without an adapter, ``base:ann`` the one with the adapter ``ann``. There
    are POST ``/v1/completions`` and ``/v1/chat/completions`` with the options max_tokens, temperature, top_p,
    seed, stop and stream, where a prompt is a text or a list of token ids; GET ``/v1/models``; and, with
    ``add_from``, POST ``/v1/adapters`` and DELETE ``/v1/adapters/NAME``. A request that would wait where as
    many wait as may is a 503 with ``Retry-After``.

    It has no users: whoever reaches the address can ask. ``serve_forever()`` answers until ``shutdown()`` is
    called in another thread; ``server_close()`` then frees the port.

    Args:
        engine: the engine.
        tokenizer: turns texts into token ids and back.
        host: the address of this machine to listen at; by default the loopback.
        port: the port; 0 for any that is free, which ``server_port`` then names.
        add_from: a folder; clients may add adapters that lie below it, and delete adapters. By default they
            may not.

    Raises:
        TypeError: the engine is no `Engine`.
        OSError: nothing can listen at this address.

    Example:
        >>> import json, threading, urllib.request, lortalib
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                                      num_hidden_layers=2, num_attention_heads=4)).eval()
        >>> engine = lortalib.serve.Engine(model, lortalib.nn.bank(model, "cp", rank=2), [0], room=256)
        >>> class Numbers:  # a tokenizer whose texts are the token ids
        ...     def decode(self, tokens, skip_special_tokens):
        ...         return " ".join(map(str, tokens))
        >>> with Server(engine, Numbers()) as server:
        ...     threading.Thread(target=server.serve_forever).start()
        ...     address = f"http://127.0.0.1:{server.server_port}/v1/completions"
        ...     body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 4}
        ...     with urllib.request.urlopen(address, json.dumps(body).encode()) as answer:
        ...         found = json.load(answer)
        ...     server.shutdown()
        >>> found["usage"]["prompt_tokens"]
        3
        >>> engine.close()
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        add_from: str | PathLike[str] | None = None,
    ) -> None:
        ENGINE.check("Server(): engine", engine)
        super().__init__(host, port, _CONNECTIONS + engine.waiting)
        self.engine, self.tokenizer = engine, tokenizer
        self._add_from = None if add_from is None else Path(add_from).resolve()
        self._numbers = count()
        self.gets = {"/v1/models": self._models}
        self.posts = {
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._chat,
            "/v1/adapters": self._add,
        }
        self.deletes = {"/v1/adapters": self._delete}

    def _complete(
        self, body: dict[str, Any], has_gone: HasGone
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer POST /v1/completions."""
        self._turn_away_if_busy()
        return self._answer(body, has_gone, self._token_ids(body.get("prompt")), Completions())

    def _chat(
        self, body: dict[str, Any], has_gone: HasGone
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer POST /v1/chat/completions."""
        self._turn_away_if_busy()
        if not getattr(self.tokenizer, "chat_template", None):
            raise HttpError("the tokenizer has no chat template; use /v1/completions", 400)
        messages = take(body, "messages", list)
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates raise what they like
            raise HttpError(f"the messages do not fit the chat template: {error}", 400) from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._answer(body, has_gone, ids, ChatCompletions())

    def _turn_away_if_busy(self) -> None:
        """Refuse a request before its text is turned into tokens."""
        try:
            self.engine.check_waiting()
        except BusyError as error:
            raise HttpError(str(error), 503, AGAIN) from error

    def _answer(
        self, body: dict[str, Any], has_gone: HasGone, ids: list[int], form: Completions
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        if take(body, "n", int, 1) != 1:
            raise HttpError("this server gives one answer: n must be 1", 400)
        request, stop = self._request(body, ids, form.length), stop_texts(body)
        head = {"id": f"cmpl-{next(self._numbers)}", "model": take(body, "model", str, BASE)}
        in_parts = take(body, "stream", bool, False)
        try:
            pieces = self._pieces(request, self.engine.answer(request, has_gone), stop)
        except KeyError:
            raise HttpError(unknown(head["model"]), 404) from None
        except BusyError as error:
            raise HttpError(str(error), 503, AGAIN) from error
        except ValueError as error:
            raise HttpError(str(error), 400) from error
        if in_parts:
            return ({**head, **form.chunk(piece)} for piece in pieces)
        *parts, last = pieces
        text = "".join(piece.text for piece in (*parts, last))
        given, new = len(ids), len(last.tokens)
        usage = {
            "prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new,
        }  # fmt: skip
        return {**head, **form.whole(Piece(text, last.tokens, last.reason)), "usage": usage}

    def _request(self, body: dict[str, Any], ids: list[int], default: int | None) -> Request:
        """Read a request's options; without one, ``default`` is the largest number of new tokens."""
        name = take(body, "model", str, BASE)
        base, colon, adapter = name.partition(":")
        if base != BASE:
            raise HttpError(unknown(name), 404)
        positions = getattr(self.engine.model.config, "max_position_embeddings", None)
        if default is None:
            default = max(1, min(self.engine.room, positions or self.engine.room) - len(ids))
        length = take(body, "max_tokens", int, take(body, "max_completion_tokens", int, default))
        seed = take(body, "seed", int, None)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise HttpError(f"'seed' must be an integer of 64 bits; found {seed}", 400)
        request = Request(
            ids,
            adapter if colon else None,
            length,
            take_number(body, "temperature", 1.0),
            take_number(body, "top_p", 1.0),
            seed,
        )
        if not ids:
            raise HttpError("the prompt is empty", 400)
        if request.length < 1:
            raise HttpError(f"max_tokens must be positive; found {request.length}", 400)
        if positions is not None and len(ids) + request.length > positions:
            needed = f"{len(ids)} tokens of the prompt and max_tokens {request.length}"
            raise HttpError(f"{needed} are more than the model's {positions} positions", 400)
        if not 0 <= request.temperature < float("inf") or not 0 < request.top_p <= 1:
            raise HttpError("temperature must be 0 or more, and top_p above 0 and at most 1", 400)
        return request

    def _pieces(self, request: Request, updates: Any, stop: Sequence[str]) -> Iterator[Piece]:
        """Divide an answer into pieces of text, up to where a stop text begins."""
        sent = 0
        with closing(updates):
            for tokens, done in updates:
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found = [text.find(each) for each in stop if each in text]
                if found:
                    yield Piece(text[sent : min(found)], tokens, "stop")
                    return
                if done:
                    full = len(tokens) == request.length
                    yield Piece(text[sent:], tokens, "length" if full else "stop")
                    return
                safe = len(text) - unsafe(text, stop)
                if safe > sent:
                    yield Piece(text[sent:safe], tokens)
                    sent = safe

    def _token_ids(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt, a text or a list of ids."""
        size = self.engine.model.config.vocab_size
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        if not isinstance(prompt, list) or not prompt:
            raise HttpError("prompt must be a text or a list of token ids, and not empty", 400)
        if not all(type(token) is int and 0 <= token < size for token in prompt):
            raise HttpError(f"token ids are integers from 0 to {size - 1}", 400)
        return prompt

    def _add(self, body: dict[str, Any], has_gone: HasGone) -> dict[str, Any]:
        """Answer POST /v1/adapters."""
        above = self._changes_from()
        name, path = take(body, "name", str), take(body, "path", str)
        if not name:
            raise HttpError("'name' must not be empty", 400)
        try:
            folder = (above / path).resolve()
            if not folder.is_relative_to(above):
                raise HttpError(
                    f"'path' must be that of a folder below {above}; found {path!r}", 403
                )
            self.engine.adapters.put(name, folder)
        except (OSError, ValueError) as error:
            raise HttpError(str(error), 400) from error
        return {"id": f"{BASE}:{name}", "object": "model"}

    def _delete(self, name: str) -> dict[str, Any]:
        """Answer DELETE /v1/adapters/NAME."""
        self._changes_from()
        try:
            self.engine.adapters.delete(name)
        except KeyError:
            raise HttpError(unknown(f"{BASE}:{name}"), 404) from None
        return {"id": f"{BASE}:{name}", "object": "model", "deleted": True}

    def _changes_from(self) -> Path:
        """Return the folder below which clients may find adapters to add."""
        if self._add_from is None:
            raise HttpError(
                "this server's adapters are not for clients to change; start it with --add-from FOLDER to "
                "allow it",
                403,
            )
        return self._add_from

    def _models(self) -> dict[str, Any]:
        """Answer GET /v1/models."""
        names = [BASE, *(f"{BASE}:{name}" for name in self.engine.adapters)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


def unknown(name: str) -> str:
    """Say that there is no such model."""
    return (
        f"the model {name} does not exist; GET /v1/models lists all: {BASE}, and {BASE}:NAME for an "
        "adapter"
    )


def unsafe(text: str, stop: Sequence[str]) -> int:
    """Return how many letters of the end can change or belong to a stop text once more tokens come."""
    begun = [k for each in stop for k in range(1, len(each)) if text.endswith(each[:k])]
    return max(begun, default=int(text.endswith("\N{REPLACEMENT CHARACTER}")))


def stop_texts(body: dict[str, Any]) -> list[str]:
    """Read the texts that end an answer: none, one, or a list."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        raise HttpError(f"'stop' must be a text or a list of texts; found {stop!r}", 400)
    return stop
