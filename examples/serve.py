"""Serving many adapters of one model: OpenAI's completions, every request with an adapter of its own.

    python examples/serve.py MODEL --decomposition cp --rank 16 --shared in out --adapters ann=FOLDER

    curl localhost:8000/v1/completions -d '{"model": "base:ann", "prompt": "Once", "max_tokens": 16}'
    curl localhost:8000/v1/chat/completions -d '{"model": "base:ann", "stream": true,
                                                 "messages": [{"role": "user", "content": "Hello"}]}'
    curl localhost:8000/v1/adapters -d '{"name": "eve", "path": "FOLDER"}'    adds or replaces an adapter
    curl -X DELETE localhost:8000/v1/adapters/eve
    curl localhost:8000/v1/models

Requests join the running batch of transformers' continuous batching when they come, whatever adapters they
name (serve_engine.py); the model ``base`` is the one without an adapter. Of OpenAI's options there are
max_tokens, temperature, top_p, seed, stop and stream; a prompt is a text, or a list of token ids. The server
gives up a request whose client leaves, and refuses one that is larger than its room for tokens (--room). It
listens on the loopback, and whoever reaches it can let it load folders: keep it behind one that knows users.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Any

from serve_engine import Engine, Request
from serve_forms import ChatCompletions, Completions, Piece
from serve_http import HasGone, HttpError, JsonServer, take, take_number
from transformers import AutoModelForCausalLM, AutoTokenizer

import lortalib

BASE = "base"


class Server(JsonServer):
    """Gives requests to an engine.

    Args:
        engine: the engine.
        tokenizer: turns texts into token ids and back.
        port: the port; 0 for any that is free.
    """

    def __init__(self, engine: Engine, tokenizer: Any, port: int = 0) -> None:
        super().__init__(port)
        self.engine, self.tokenizer, self.numbers = engine, tokenizer, count()
        self.gets = {"/v1/models": self.models}
        self.posts = {
            "/v1/completions": self.complete,
            "/v1/chat/completions": self.chat,
            "/v1/adapters": self.add,
        }

    def complete(
        self, body: dict[str, Any], has_gone: HasGone
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer POST /v1/completions."""
        return self._answer(body, has_gone, self.token_ids(body.get("prompt")), Completions())

    def chat(
        self, body: dict[str, Any], has_gone: HasGone
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer POST /v1/chat/completions."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise HttpError(400, "the tokenizer has no chat template; use /v1/completions")
        messages = take(body, "messages", list)
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            text = self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates raise what they like
            raise HttpError(400, f"the messages do not fit the chat template: {error}") from error
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._answer(body, has_gone, ids, ChatCompletions())

    def _answer(
        self, body: dict[str, Any], has_gone: HasGone, ids: list[int], form: Completions
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        if take(body, "n", int, 1) != 1:
            raise HttpError(400, "this server gives one answer: n must be 1")
        request, stop = self._request(body, ids), stop_texts(body)
        head = {"id": f"cmpl-{next(self.numbers)}", "model": take(body, "model", str, BASE)}
        in_parts = take(body, "stream", bool, False)
        try:
            pieces = self._pieces(request, self.engine.answer(request, has_gone), stop)
        except KeyError:
            raise HttpError(404, unknown(head["model"])) from None
        except ValueError as error:
            raise HttpError(400, str(error)) from error
        if in_parts:
            return ({**head, **form.chunk(piece)} for piece in pieces)
        *parts, last = pieces
        text = "".join(piece.text for piece in (*parts, last))
        given, new = len(ids), len(last.tokens)
        usage = {
            "prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new,
        }  # fmt: skip
        return {**head, **form.whole(Piece(text, last.tokens, last.reason)), "usage": usage}

    def _request(self, body: dict[str, Any], ids: list[int]) -> Request:
        """Read a request's options."""
        name = take(body, "model", str, BASE)
        base, colon, adapter = name.partition(":")
        if base != BASE:
            raise HttpError(404, unknown(name))
        length = take(body, "max_tokens", int, take(body, "max_completion_tokens", int, 16))
        seed = take(body, "seed", int, None)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise HttpError(400, f"'seed' must be an integer of 64 bits; found {seed}")
        request = Request(
            ids,
            adapter if colon else None,
            length,
            take_number(body, "temperature", 1.0),
            take_number(body, "top_p", 1.0),
            seed,
        )
        positions = getattr(self.engine.model.config, "max_position_embeddings", None)
        if not ids:
            raise HttpError(400, "the prompt is empty")
        if request.length < 1:
            raise HttpError(400, f"max_tokens must be positive; found {request.length}")
        if positions is not None and len(ids) + request.length > positions:
            needed = f"{len(ids)} tokens of the prompt and max_tokens {request.length}"
            raise HttpError(400, f"{needed} are more than the model's {positions} positions")
        if not 0 <= request.temperature < float("inf") or not 0 < request.top_p <= 1:
            raise HttpError(400, "temperature must be 0 or more, and top_p above 0 and at most 1")
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

    def token_ids(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt, a text or a list of ids."""
        size = self.engine.model.config.vocab_size
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        if not isinstance(prompt, list) or not prompt:
            raise HttpError(400, "prompt must be a text or a list of token ids, and not empty")
        if not all(type(token) is int and 0 <= token < size for token in prompt):
            raise HttpError(400, f"token ids are integers from 0 to {size - 1}")
        return prompt

    def add(self, body: dict[str, Any], has_gone: HasGone) -> dict[str, Any]:
        """Answer POST /v1/adapters."""
        name, path = take(body, "name", str), take(body, "path", str)
        if not name:
            raise HttpError(400, "'name' must not be empty")
        try:
            self.engine.adapters.put(name, path)
        except (OSError, ValueError) as error:
            raise HttpError(400, str(error)) from error
        return {"id": f"{BASE}:{name}", "object": "model"}

    def delete(self, name: str) -> dict[str, Any]:
        """Answer DELETE /v1/adapters/NAME."""
        try:
            self.engine.adapters.delete(name)
        except KeyError:
            raise HttpError(404, unknown(f"{BASE}:{name}")) from None
        return {"id": f"{BASE}:{name}", "object": "model", "deleted": True}

    def models(self) -> dict[str, Any]:
        """Answer GET /v1/models."""
        names = [BASE, *(f"{BASE}:{name}" for name in self.engine.adapters)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


def unknown(name: str) -> str:
    """Say that there is no such model."""
    return f"the model {name} does not exist; GET /v1/models lists all"


def unsafe(text: str, stop: Sequence[str]) -> int:
    """Return how many letters of the end can change or belong to a stop text once more tokens come."""
    begun = [k for each in stop for k in range(1, len(each)) if text.endswith(each[:k])]
    return max(begun, default=int(text.endswith("\N{REPLACEMENT CHARACTER}")))


def stop_texts(body: dict[str, Any]) -> list[str]:
    """Read the texts that end an answer: none, one, or a list."""
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(each, str) and each for each in stop):
        raise HttpError(400, f"'stop' must be a text or a list of texts; found {stop!r}")
    return stop


def main(arguments: Iterable[str] | None = None) -> None:
    """Load a model and its adapters, and serve them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--decomposition", default="cp")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shared", nargs="*", default=[], help="legs, such as in out")
    parser.add_argument("--adapters", nargs="*", default=[], help="NAME=FOLDER")
    parser.add_argument("--room", type=int, default=2**15, help="tokens of all running requests")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(arguments if arguments is None else list(arguments))
    wrong = [each for each in args.adapters if not all(each.partition("="))]
    if wrong:
        parser.error(f"--adapters takes NAME=FOLDER; found {wrong[0]!r}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token_id is None:
        parser.error(f"the tokenizer of {args.model} has no token that ends a text")
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    bank = lortalib.nn.bank(model, args.decomposition, args.rank, shared=args.shared)
    engine = Engine(model, bank, [tokenizer.eos_token_id], args.room)
    for each in args.adapters:
        engine.adapters.put(*each.split("=", 1))
    server = Server(engine, tokenizer, args.port)
    print(f"{len(engine.adapters)} adapters at 127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
