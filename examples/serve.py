"""Serving many adapters of one model: OpenAI's completions, every request with an adapter of its own.

    python examples/serve.py MODEL --decomposition cp --rank 16 --shared in out --adapters ann=FOLDER

    curl localhost:8000/v1/completions -d '{"model": "base:ann", "prompt": "Once", "max_tokens": 16}'
    curl localhost:8000/v1/adapters -d '{"name": "eve", "path": "FOLDER"}'    adds or replaces an adapter
    curl -X DELETE localhost:8000/v1/adapters/eve
    curl localhost:8000/v1/models

Requests that wait together are decoded in one batch, whatever adapters they name; the model ``base`` is
the one without an adapter. Decoding is greedy. A prompt is a text, or a list of token ids. The server listens
on the loopback, and whoever reaches it can let it load folders: keep it behind a server that knows its users.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import unquote

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lortalib
from lortalib.nn import Bank

BASE = "base"


class HttpError(Exception):
    """An answer with an error status, as OpenAI's servers give it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Request:
    """A completion that somebody waits for.

    Attributes:
        ids: the token ids of the prompt.
        adapter: the name of the adapter; None for the base.
        length: the largest number of new tokens.
        answer: the new tokens, once they are there.
    """

    ids: list[int]
    adapter: str | None
    length: int
    answer: Future[list[int]] = field(default_factory=Future)


class Engine:
    """Decodes the requests that wait, in batches whose rows have adapters of their own.

    Args:
        model: the model, with a bank on it.
        bank: the bank; adapters may be added, replaced and deleted at any time.
        ends: the token ids that end a completion; the first also pads.
        largest: the largest number of rows of a batch.
    """

    def __init__(self, model: Any, bank: Bank, ends: Sequence[int], largest: int = 64) -> None:
        self.model, self.bank, self.ends, self.largest = model, bank, list(ends), largest
        self._waiting: queue.Queue[Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[list[int]]:
        """Let a request wait for its batch."""
        self._waiting.put(request)
        return request.answer

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self.largest and not self._waiting.empty():
                batch.append(self._waiting.get())
            requests = [request for request in batch if request is not None]
            for part in self._parts(requests):
                try:
                    self._answer(part)
                except Exception as error:  # those who wait get the error, and the engine goes on
                    for request in part:
                        if not request.answer.done():
                            request.answer.set_exception(error)
            if None in batch:
                return

    def _parts(self, requests: Iterable[Request]) -> list[list[Request]]:
        """Divide requests such that the longest prompt and answer of each part fit the model's positions."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        parts: list[list[Request]] = []
        for request in requests:
            for part in parts:
                together = [*part, request]
                needed = max(len(r.ids) for r in together) + max(r.length for r in together)
                if positions is None or needed <= positions:
                    part.append(request)
                    break
            else:
                parts.append([request])
        return parts

    def _answer(self, requests: list[Request]) -> None:
        """Decode requests in one batch; those whose adapter was deleted meanwhile get an error."""
        while requests:
            known = [r for r in requests if r.adapter is None or r.adapter in self.bank]
            for request in requests:
                if request not in known:
                    request.answer.set_exception(unknown(request.adapter))
            requests = known
            if not requests:
                return
            try:
                context = self.bank.using([request.adapter for request in requests])
                with context:
                    found = self._decode(requests)
            except KeyError:  # deleted between the look and the gathering
                continue
            for request, tokens in zip(requests, found):
                request.answer.set_result(tokens)
            return

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request]) -> list[list[int]]:
        width = max(len(request.ids) for request in requests)
        pad, device = self.ends[0], self.model.device
        ids = torch.tensor([[pad] * (width - len(r.ids)) + r.ids for r in requests], device=device)
        mask = torch.tensor(
            [[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in requests], device=device
        )
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(request.length for request in requests),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.ends,
        )
        return [
            self._until_end(row[: r.length]) for r, row in zip(requests, out[:, width:].tolist())
        ]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [k for k, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0]] if ends else tokens


def unknown(adapter: str | None) -> HttpError:
    """Make the error of an adapter that is not in the bank."""
    return HttpError(404, f"the model {BASE}:{adapter} does not exist; GET /v1/models lists all")


class Server(ThreadingHTTPServer):
    """Listens on the loopback and gives requests to an engine.

    Args:
        engine: the engine.
        tokenizer: turns texts into token ids and back.
        port: the port; 0 for any that is free.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, engine: Engine, tokenizer: Any, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine, self.tokenizer, self.numbers = engine, tokenizer, count()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer POST /v1/completions."""
        name = take(body, "model", str, BASE)
        base, colon, adapter = name.partition(":")
        if base != BASE or (colon and adapter not in self.engine.bank):
            raise HttpError(404, f"the model {name} does not exist; GET /v1/models lists all")
        length = take(body, "max_tokens", int, 16)
        if length < 1:
            raise HttpError(400, f"max_tokens must be positive; found {length}")
        if body.get("temperature") or body.get("stream") or body.get("n", 1) != 1:
            raise HttpError(
                400, "this server decodes greedily: one answer, temperature 0, no stream"
            )
        request = Request(self.token_ids(body.get("prompt")), adapter if colon else None, length)
        tokens = self.engine.submit(request).result()
        return {
            "id": f"cmpl-{next(self.numbers)}",
            "object": "text_completion",
            "model": name,
            "choices": [
                {
                    "index": 0,
                    "text": self.tokenizer.decode(tokens),
                    "token_ids": tokens,
                    "finish_reason": "length" if len(tokens) == length else "stop",
                }
            ],
            "usage": {
                "prompt_tokens": len(request.ids),
                "completion_tokens": len(tokens),
                "total_tokens": len(request.ids) + len(tokens),
            },
        }

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

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer POST /v1/adapters."""
        name, path = take(body, "name", str), take(body, "path", str)
        try:
            self.engine.bank.add(name, path)
        except (OSError, ValueError) as error:
            raise HttpError(400, str(error)) from error
        return {"id": f"{BASE}:{name}", "object": "model"}

    def delete(self, name: str) -> dict[str, Any]:
        """Answer DELETE /v1/adapters/NAME."""
        try:
            del self.engine.bank[name]
        except KeyError:
            raise unknown(name) from None
        return {"id": f"{BASE}:{name}", "object": "model", "deleted": True}

    def models(self) -> dict[str, Any]:
        """Answer GET /v1/models."""
        names = [BASE, *(f"{BASE}:{name}" for name in self.engine.bank)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


def take(body: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return a field of a request; an error says which field is missing or of another type."""
    value = body.get(key, default)
    if type(value) is not kind:
        raise HttpError(400, f"{key!r} must be of the type {kind.__name__}; found {value!r}")
    return value


class Handler(BaseHTTPRequestHandler):
    """Reads JSON and writes JSON."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer({"/v1/models": self.server.models})

    def do_POST(self) -> None:
        """Answer a POST."""
        routes = {"/v1/completions": self.server.complete, "/v1/adapters": self.server.add}
        self._answer({path: lambda call=call: call(self._body()) for path, call in routes.items()})

    def do_DELETE(self) -> None:
        """Answer a DELETE."""
        folder, _, name = self.path.rpartition("/")
        known = folder == "/v1/adapters" and name
        self._answer({self.path: lambda: self.server.delete(unquote(name))} if known else {})

    def _body(self) -> dict[str, Any]:
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        except ValueError as error:
            raise HttpError(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise HttpError(400, "the body must be a JSON object")
        return body

    def _answer(self, routes: dict[str, Any]) -> None:
        status = 200
        try:
            if self.path not in routes:
                raise HttpError(404, f"there is no {self.command} {self.path}")
            found = routes[self.path]()
        except HttpError as error:
            status, found = error.status, {"error": {"message": str(error), "code": error.status}}
        except Exception as error:
            status, found = 500, {"error": {"message": repr(error), "code": 500}}
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def main(arguments: Iterable[str] | None = None) -> None:
    """Load a model and its adapters, and serve them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--decomposition", default="cp")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shared", nargs="*", default=[], help="legs, such as in out")
    parser.add_argument("--adapters", nargs="*", default=[], help="NAME=FOLDER")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(arguments if arguments is None else list(arguments))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    bank = lortalib.nn.bank(model, args.decomposition, args.rank, shared=args.shared)
    bank.update(dict(each.split("=", 1) for each in args.adapters))
    server = Server(Engine(model, bank, [tokenizer.eos_token_id]), tokenizer, args.port)
    print(f"serving {len(bank)} adapters at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
