"""The engine of examples/serve.py: transformers' continuous batching with a bank.

Requests join the running batch whenever they come. In each forward the tokens of all requests lie in one
row, and two hooks around it do what continuous batching does not: the one before names the adapter of every
token, the one behind draws every request's next token with its own temperature, top_p and seed.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from lortalib.nn import Adapter, Bank


class Catalogue:
    """The adapters that requests can name; a request keeps the one that it began with.

    The bank has a number for each version of an adapter, and drops a version that was replaced or deleted
    when its last request is done.

    Args:
        bank: an empty bank.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._numbers = count()
        self._current: dict[str, int] = {}
        self._users: Counter[int] = Counter()
        self._lock = threading.Lock()

    def put(self, name: str, source: Any) -> None:
        """Add or replace an adapter; sources are those of `Bank.add`, and so are errors."""
        number = next(self._numbers)
        self.bank.add(number, source)
        with self._lock:
            old = self._current.get(name)
            self._current[name], self._users[number] = number, 1  # the catalogue is a user too
        if old is not None:
            self.release(old)

    def delete(self, name: str) -> None:
        """Delete an adapter; KeyError if there is none of this name."""
        with self._lock:
            number = self._current.pop(name)
        self.release(number)

    def acquire(self, name: str) -> int:
        """Return the current version of an adapter and keep it; KeyError if there is none."""
        with self._lock:
            number = self._current[name]
            self._users[number] += 1
            return number

    def release(self, number: int) -> None:
        """Let one user of a version go; the last one drops it from the bank."""
        with self._lock:
            self._users[number] -= 1
            if not self._users[number]:
                del self._users[number], self.bank[number]

    def adapter(self, name: str) -> Adapter:
        """Copy an adapter out; KeyError if there is none."""
        number = self.acquire(name)
        try:
            return self.bank.adapter(number)
        finally:
            self.release(number)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._current))

    def __len__(self) -> int:
        return len(self._current)


@dataclass
class Request:
    """A completion that somebody waits for.

    Attributes:
        ids: the token ids of the prompt.
        adapter: the name of the adapter; None for the base.
        length: the largest number of new tokens.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_p: the tokens to draw from are the likeliest ones, as few as have this probability together.
        seed: of the drawing; the same request with the same seed has the same answer.
    """

    ids: list[int]
    adapter: str | None = None
    length: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    version: int | None = field(default=None, init=False)
    updates: queue.Queue[Any] = field(default_factory=queue.Queue, init=False, repr=False)

    def __post_init__(self) -> None:
        self._draw = torch.Generator()
        self._draw.seed() if self.seed is None else self._draw.manual_seed(self.seed)

    def scores(self, logits: Tensor) -> Tensor:
        """Return scores (vocabulary,) of which the largest is a draw from the distribution of the logits."""
        if self.temperature == 0:
            return logits
        # In float64 and from the largest on, so that the smallest temperatures do not overflow.
        logits = (logits.double() - logits.max()) / self.temperature
        if self.top_p < 1:
            ranked, order = logits.softmax(-1).sort(descending=True)
            before = ranked.cumsum(-1) - ranked
            logits = logits.index_fill(-1, order[before >= self.top_p], -torch.inf)
        # The largest of logits with Gumbel noise is distributed as their softmax.
        drawn = torch.empty(logits.shape).exponential_(generator=self._draw)
        return logits - drawn.log().to(logits)


class Engine:
    """Answers requests in one running batch.

    Args:
        model: a causal language model, with a bank on it.
        bank: the bank, which is empty.
        ends: the token ids that end a completion.
        room: the number of tokens, of all running requests, whose keys and values are kept.
        width: the largest number of tokens of a forward.
    """

    def __init__(
        self, model: Any, bank: Bank, ends: Sequence[int], room: int = 2**15, width: int = 1024
    ) -> None:
        self.model, self.ends = model, list(ends)
        self.adapters = Catalogue(bank)
        self._running: dict[str, Request] = {}
        self._numbers = count()
        self._context: AbstractContextManager[Any] | None = None
        page = 32
        self.room = room // page * page
        self._manager = model.init_continuous_batching(
            # The hook behind the forward draws, and the manager takes the largest score.
            GenerationConfig(do_sample=False, eos_token_id=self.ends, pad_token_id=self.ends[0]),
            ContinuousBatchingConfig(
                page_size=page,
                num_blocks=self.room // page,
                max_batch_tokens=width,
                allow_block_sharing=False,  # the keys of a prefix differ between adapters
                use_async_batching=False,  # hooks are called in Python, for the batch that is next
                use_cuda_graph=False,
            ),
        )
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        self._manager.warmup()  # makes the scheduler
        self._scheduler = self._manager.batch_processor.scheduler
        self._clear_cancelled = self._scheduler.clear_cancelled_requests
        self._scheduler.clear_cancelled_requests = self._give_up
        self._manager.start()
        self._reader = threading.Thread(target=self._deliver, daemon=True)
        self._reader.start()

    def answer(
        self, request: Request, has_gone: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[list[int], bool]]:
        """Answer a request, which is submitted at once.

        The iterator gives the tokens so far, without the end, and whether these are all. If it is closed
        early, the engine gives the request up.

        Args:
            request: the request.
            has_gone: whether nobody waits any more; the iterator then raises ConnectionAbortedError.

        Raises:
            KeyError: there is no such adapter.
            ValueError: the engine has not the room for so many tokens.
            RuntimeError: the engine failed, or was closed.
        """
        # The last token is not read again, so it needs no room.
        if len(request.ids) + request.length - 1 > self.room:
            raise ValueError(
                f"{len(request.ids)} tokens of the prompt and {request.length} new ones are more than this "
                f"server's room for {self.room}"
            )
        if request.adapter is not None:
            request.version = self.adapters.acquire(request.adapter)
        name = str(next(self._numbers))
        self._running[name] = request
        options = {"max_new_tokens": request.length, "eos_token_id": self.ends, "streaming": True}
        if self._manager.add_request(request.ids, request_id=name, **options) is None:
            self._finish(name)
            raise RuntimeError("the engine takes no more requests")
        return self._updates(name, request, has_gone)

    def _updates(
        self, name: str, request: Request, has_gone: Callable[[], bool]
    ) -> Iterator[tuple[list[int], bool]]:
        done = False
        try:
            while not done:
                if has_gone():
                    raise ConnectionAbortedError("nobody waits for the answer")
                alive = self._reader.is_alive()
                try:
                    output = request.updates.get(timeout=0.2)
                except queue.Empty:
                    if alive:
                        continue
                    raise RuntimeError("the engine has stopped") from None
                done = output.is_finished()
                if output.error is not None:
                    raise RuntimeError(output.error)
                tokens = output.generated_tokens
                yield tokens[:-1] if tokens and tokens[-1] in self.ends else tokens, done
        finally:
            if not done:
                self._manager.cancel_request(name)

    def _give_up(self) -> list[Any]:
        """Take cancelled requests out of the scheduler, between two forwards, and let their adapters go."""
        given_up: list[Any] = self._clear_cancelled()
        for state in given_up:
            self._finish(state.request_id)
        if given_up:  # there is room again, as when a request is done
            self._scheduler.block_new_requests = False
        return given_up

    def close(self) -> None:
        """Answer what was submitted, then stop; the model has no hooks of the engine afterwards."""
        self._manager.stop(block=True)
        self._reader.join()
        self._manager.destroy()
        for hook in self._hooks:
            hook.remove()

    def _deliver(self) -> None:
        """Hand the outputs of the manager to those who wait."""
        while True:
            running = self._manager.is_running()
            output = self._manager.get_result(timeout=0.1)
            if output is not None:
                request = self._running.get(output.request_id)
                if request is not None:  # else it was given up
                    request.updates.put(output)
                    if output.is_finished():
                        self._finish(output.request_id)
            elif not running:
                return

    def _finish(self, name: str) -> None:
        request = self._running.pop(name)
        if request.version is not None:
            self.adapters.release(request.version)

    def _batch(self) -> list[tuple[Request, Any]]:
        """Return the requests of the batch, in the order of their tokens."""
        states = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(self._running[each.state.request_id], each) for each in states]

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Name the adapter of each token."""
        row: list[Hashable] = [
            request.version for request, each in self._batch() for _ in range(each.query_length)
        ]
        self._context = self.adapters.bank.using([row])
        self._context.__enter__()

    def _leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits by scores of which each request's next token has the largest."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)
        if output is None:  # the forward raised
            return None
        logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        drawing = [request for request, each in self._batch() if each.has_new_token]
        kept = "logits_to_keep" in kwargs  # then there are no others
        places = range(len(drawing)) if kept else kwargs["logits_indices"].tolist()
        for request, place in zip(drawing, places):
            row = logits[0, place]
            row.copy_(request.scores(row))
        output.logits = logits
        return output
