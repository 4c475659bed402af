"""Defines the engine: transformers' continuous batching with a bank.

Requests join the running batch whenever they come. In each forward the tokens of all requests lie in one
row, and two hooks around it do what continuous batching does not: the one before names the adapter of every
token, the one behind draws every request's next token with its own temperature, top_p and seed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from .._kinds import Kind
from ..nn import Bank
from ._catalogue import Catalogue
from ._request import Request

MODEL = Kind(
    "a causal language model of transformers, which has init_continuous_batching",
    lambda value: hasattr(value, "init_continuous_batching"),
)
BANK = Kind("a bank, as lortalib.nn.bank makes it", lambda value: isinstance(value, Bank))

#: The threads in which managers of transformers run. Python waits for them at the end of a process.
_GENERATING: WeakSet[threading.Thread] = WeakSet()

#: The models that have an engine.
_ANSWERING: WeakSet[Any] = WeakSet()


class BusyError(RuntimeError):
    """Raised for a request that is one too many."""


class Engine:
    """Answers requests in one running batch.

    Requests that do not fit together take turns: they wait, in the order in which they came.

    Args:
        model: a causal language model, with the bank on it.
        bank: the bank; its adapters can be named at once, and change through `adapters` from now on.
        ends: the token ids that end a completion, as `end_tokens` finds them.
        room: the number of tokens, of all running requests, whose keys and values are kept.
        width: the largest number of tokens of a forward.
        waiting: the largest number of requests that wait.

    Attributes:
        model: the model.
        adapters: the `Catalogue` of adapters that requests can name.
        room: the number of tokens that there is room for, a multiple of 32.
        waiting: the largest number of requests that wait.

    Raises:
        TypeError: the model or the bank is of another kind.
        ImportError: transformers is older than 5.18.
        ValueError: no token ends a completion; a number that is too small; the model has an engine already.

    After any error, as of memory for a room that is too large, the model is as before.

    Example:
        >>> import lortalib
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...                                      num_hidden_layers=2, num_attention_heads=4)).eval()
        >>> bank = lortalib.nn.bank(model, "cp", rank=2)
        >>> bank["ann"] = {"layers": [t.normal_() for t in bank[None]["layers"]]}
        >>> engine = Engine(model, bank, ends=[0], room=256)
        >>> request = lortalib.serve.Request([5, 6, 7], adapter="ann", length=4, temperature=0)
        >>> for tokens, done in engine.answer(request):
        ...     pass
        >>> len(tokens) <= 4, done
        (True, True)
        >>> engine.close()
    """

    def __init__(
        self,
        model: Any,
        bank: Bank,
        ends: Sequence[int],
        room: int = 2**15,
        width: int = 1024,
        waiting: int = 256,
    ) -> None:
        page = 32
        BANK.check("Engine(): bank", bank)
        MODEL.check("Engine(): model", model)
        if "page_size" not in vars(ContinuousBatchingConfig()):
            raise ImportError(
                "lortalib.serve needs transformers 5.18 or newer, whose continuous batching it uses; found "
                f"{transformers.__version__}"
            )
        if not ends:
            raise ValueError("a completion needs a token that ends it; give ends=[id]")
        if room < page or width < 1 or waiting < 1:
            raise ValueError(
                f"the engine needs a room of at least {page} tokens, a width of at least 1 and at least 1 "
                f"request that may wait; found {room}, {width} and {waiting}"
            )
        if model in _ANSWERING:
            raise ValueError(
                "the model has an engine already, and two would read each other's forwards; close() that one "
                "first, or change its adapters through engine.adapters"
            )
        self.model, self.waiting = model, waiting
        self._ends = list(ends)
        self.adapters = Catalogue(bank)
        self._running: dict[str, Request] = {}
        self._door = threading.Lock()  # for one who comes in
        self._numbers = count()
        self._context: AbstractContextManager[Any] | None = None
        self.room = room // page * page
        self._hooks: list[Any] = []
        attention = model.config._attn_implementation
        try:
            self._start(page, width)
        except BaseException:
            for hook in self._hooks:
                hook.remove()
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            raise
        _ANSWERING.add(model)
        self._reader = threading.Thread(target=self._deliver, daemon=True)
        self._reader.start()

    def _start(self, page: int, width: int) -> None:
        """Start transformers' continuous batching, with the hooks around the model's forward."""
        model = self.model
        self._manager = model.init_continuous_batching(
            # The hook behind the forward draws, and the manager takes the largest score.
            GenerationConfig(do_sample=False, eos_token_id=self._ends, pad_token_id=self._ends[0]),
            ContinuousBatchingConfig(
                page_size=page,
                num_blocks=self.room // page,
                max_batch_tokens=width,
                allow_block_sharing=False,  # the keys of a prefix differ between adapters
                use_async_batching=False,  # hooks are called in Python, for the batch that is next
                use_cuda_graph=False,
            ),
        )
        before, behind = model.register_forward_pre_hook, model.register_forward_hook
        self._hooks.append(before(self._enter, with_kwargs=True, prepend=True))
        self._hooks.append(behind(self._leave, with_kwargs=True, always_call=True))
        self._manager.warmup()  # makes the scheduler
        self._scheduler = self._manager.batch_processor.scheduler
        self._clear_cancelled = self._scheduler.clear_cancelled_requests
        self._scheduler.clear_cancelled_requests = self._give_up
        others = set(threading.enumerate())
        self._manager.start()
        new = set(threading.enumerate()) - others
        _GENERATING.update(thread for thread in new if "generation" in thread.name)

    def check_waiting(self) -> None:
        """Refuse a request, before anything is done for it, where as many wait as may.

        Raises:
            BusyError: as many wait as may.
        """
        if sum(not each.has_begun for each in list(self._running.values())) >= self.waiting:
            raise BusyError(
                f"{self.waiting} requests wait already, and no more may; try again in a moment"
            )

    def answer(
        self, request: Request, has_gone: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[list[int], bool]]:
        """Answer a request, which is submitted at once.

        Args:
            request: the request; each is answered once.
            has_gone: returns True if nobody waits any more; the iterator then raises
                ConnectionAbortedError.

        Returns:
            An iterator over the tokens so far, without the end, and whether these are all. A reader that is
            slower than the engine skips some. If the iterator is closed early, the engine gives the request
            up.

        Raises:
            KeyError: there is no such adapter.
            ValueError: the engine has not the room for so many tokens.
            BusyError: as many requests wait as may.
            RuntimeError: the engine failed, or was closed.
        """
        # The last token is not read again, so it needs no room.
        if len(request.ids) + request.length - 1 > self.room:
            raise ValueError(
                f"{len(request.ids)} tokens of the prompt and {request.length} new ones are more than this "
                f"server's room for {self.room}"
            )
        with self._door:
            self.check_waiting()
            if request.adapter is not None:
                request.version = self.adapters.acquire(request.adapter)
            name = str(next(self._numbers))
            self._running[name] = request
        options = {"max_new_tokens": request.length, "eos_token_id": self._ends, "streaming": True}
        added = None
        try:
            added = self._manager.add_request(request.ids, request_id=name, **options)
        finally:
            if added is None:
                self._finish(name)
        if added is None:
            raise RuntimeError("the engine takes no more requests")
        updates = self._updates(name, request, has_gone)
        next(updates)  # only an iterator that has begun gives the request up when it is closed
        return updates

    def _updates(
        self, name: str, request: Request, has_gone: Callable[[], bool]
    ) -> Iterator[tuple[list[int], bool]]:
        done = False
        try:
            yield [], False
            while not done:
                if has_gone():
                    raise ConnectionAbortedError("nobody waits for the answer")
                alive = self._reader.is_alive()
                output = request.output.get(timeout=0.2)
                if output is None:
                    if alive:
                        continue
                    raise RuntimeError("the engine has stopped")
                done = output.is_finished()
                if output.error is not None:
                    raise RuntimeError(output.error)
                tokens = output.generated_tokens
                yield tokens[:-1] if tokens and tokens[-1] in self._ends else tokens, done
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

    @property
    def is_running(self) -> bool:
        """Whether it takes requests: until `close`, or a forward that raises."""
        return bool(self._manager.is_running())

    def close(self) -> None:
        """Answer what was submitted, then stop; the model has no hooks of the engine afterwards."""
        self._manager.stop(block=True)
        self._reader.join()
        self._manager.destroy()
        for hook in self._hooks:
            hook.remove()
        _ANSWERING.discard(self.model)

    def _deliver(self) -> None:
        """Hand the outputs of the manager to those who wait, until it stops; stop it at the end of the
        process, which would wait for it without an end."""
        while True:
            running = self._manager.is_running()
            if running and not _others_run():
                self._manager.stop(block=True)
            output = self._manager.get_result(timeout=0.1)
            if output is not None:
                request = self._running.get(output.request_id)
                if request is not None:  # else it was given up
                    request.output.put(output)
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
        """Name the adapter of each token.

        Raises:
            RuntimeError: another than the engine called the model, whose hooks and batch are the engine's.
        """
        if not _is_of_engine():
            raise RuntimeError(
                "an engine answers on this model, so only the engine can call it; ask "
                "engine.answer(request), or engine.close() first"
            )
        row: list[Hashable] = []
        for request, each in self._batch():
            request.has_begun = True
            row += [request.version] * each.query_length
        self._context = self.adapters.bank.using([row])
        self._context.__enter__()

    def _leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits by scores of which each request's next token has the largest."""
        if not _is_of_engine():  # it was refused before, and has no part in the running batch
            return None
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


def _is_of_engine() -> bool:
    """Return True in the thread of an engine's manager."""
    return threading.current_thread() in _GENERATING


def _others_run() -> bool:
    """Return True if the process has threads to wait for, apart from those of engines."""
    return any(
        thread.is_alive() and not thread.daemon and thread not in _GENERATING
        for thread in threading.enumerate()
    )
