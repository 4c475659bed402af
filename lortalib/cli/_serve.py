"""Defines the command ``serve``, which answers completions of a model with many adapters."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import nn as lnn
from ..nn import AdapterFileError
from ..nn.door import each_place
from ._models import DTYPES, base_of, dtype_of, load, tokenizer_of
from ._options import add_dtype, add_model_place, add_places, add_trust
from ._output import Output
from ._place import places
from ._texts import count, device, named_folder, port, text

if TYPE_CHECKING:
    from ..serve import Server

#: How many seconds the last answers may take to be sent, once all of them are there.
_LAST = 10.0


def serve(options: Namespace, output: Output) -> bool:
    """Answer OpenAI's completions of a model with many adapters: ``serve MODEL``."""
    _check_address(options.host, options.port)  # before minutes of loading
    server = make_server(options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    findings: dict[str, Any] = {
        "address": f"http://{host}:{server.server_port}/v1",
        "adapters": len(server.engine.adapters),
        "room": server.engine.room,
        "waiting": server.engine.waiting,
    }
    output.show(findings, [findings])
    output.say("GET /v1/models lists the models; Ctrl-C stops")
    sys.stdout.flush()
    server.service_actions = lambda: _check_running(server)  # type: ignore[method-assign]
    with server, _stopped_by_terminate():
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            output.say("stops after the answers that have begun; Ctrl-C again stops at once")
            sys.stdout.flush()
        finally:
            _close(server)
    return True


def _check_running(server: Server) -> None:
    """End a server that can answer no more, so that whoever watches the process starts it again."""
    if not server.engine.is_running:
        raise ValueError(
            "a forward failed, so nothing more can be answered; the answer to the last request says why. "
            "Start the server again"
        )


def _close(server: Server) -> None:
    """Let the answers that have begun end; an interrupt ends the process."""
    try:
        server.engine.close()
        server.wait_for_answers(_LAST)
    except KeyboardInterrupt:
        # A thread is in the middle of a forward, and Python's own way to end would abort there.
        os._exit(130)


def make_server(options: Namespace) -> Server:
    """Load the model and the adapters, and make the server, which then listens.

    Args:
        options: the options of the command.

    Raises:
        OSError, ValueError: as for `nn.bank_like`, `nn.Bank.add` and `nn.Bank.load`.
    """
    from ..serve import Engine, Server, end_tokens  # deferred on purpose: it loads what generates

    folders = [*options.bank, *(place for _, place in options.adapter)]
    if not folders:
        raise ValueError(
            "serve needs adapters: give --bank FOLDER, or --adapter NAME=FOLDER. The folder of an empty bank "
            "(lortalib.nn.bank(...).save) will do, with --add-from"
        )
    found = each_place(len(folders), **places(options))
    if options.add_from is not None and not Path(options.add_from).is_dir():
        raise FileNotFoundError(f"there is no folder {options.add_from}; give one as --add-from")
    base = base_of(options, options.model)
    tokenizer = tokenizer_of(base)
    model = load(base, options.dtype, whole=True).eval()
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} of {options.model} does not continue texts; give a causal language model"
        )
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    dtype = dtype_of(options.bank_dtype)
    bank = lnn.bank_like(model, folders[0], dtype=dtype, **found[0])
    for place, where in zip(options.bank, found):
        bank.load(place, **where)
    for (name, place), where in zip(options.adapter, found[len(options.bank) :]):
        if name in bank:
            raise ValueError(f"two adapters are called {name!r}; give one of them another name")
        try:
            bank.add(name, place, **where)
        except AdapterFileError:
            raise
        except ValueError as error:
            raise ValueError(
                f"{error}. The adapters of a server have one format, rank and targets, here those of "
                f"{folders[0]}; serve others at another port"
            ) from error
    ends = end_tokens(model, tokenizer)
    engine = Engine(model, bank, ends, options.room, waiting=options.waiting)
    return Server(engine, tokenizer, options.host, options.port, add_from=options.add_from)


def _check_address(host: str, number: int) -> None:
    """Refuse an address at which nothing can listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, number), family=family).close()
    except OSError as error:
        raise ValueError(
            f"nothing can listen at {host}, port {number}: {error.strerror}. Give an address of this machine "
            "as --host, and as --port one that is free, or 0 for any"
        ) from error


@contextmanager
def _stopped_by_terminate() -> Iterator[None]:
    """Let a request to terminate stop the server as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_serve(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command ``serve``.

    Args:
        add: adds a command, given its function, help text, usage and examples.
    """
    sub = add(
        serve,
        "answer OpenAI's completions of a model with many adapters over HTTP",
        "MODEL",
        "MODEL --adapter ann=ann-adapter bob=bob-adapter",
        "MODEL --bank my-bank --port 9000 --waiting 64",
        "MODEL --bank my-bank --add-from adapters --dtype bfloat16",
    )
    sub.add_argument(
        "--bank",
        nargs="+",
        action="extend",
        type=text,
        default=[],
        metavar="FOLDER",
        help="folders that bank.save wrote, or their names on the hub (default: none)",
    )
    sub.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        type=named_folder,
        default=[],
        metavar="NAME=FOLDER",
        help="adapters of one format and rank, each with the name that requests give it as base:NAME "
        "(default: none)",
    )
    sub.add_argument(
        "--host",
        type=text,
        default="127.0.0.1",
        help="address of this machine to listen at; whoever reaches another than the loopback can use the "
        "model, so put a server that knows users before it (default: 127.0.0.1)",
    )
    sub.add_argument(
        "--port", type=port, default=8000, help="port, or 0 for any that is free (default: 8000)"
    )
    sub.add_argument(
        "--room",
        type=count,
        default=2**15,
        metavar="N",
        help="tokens of all running requests whose keys and values are kept (default: 32768)",
    )
    sub.add_argument(
        "--waiting",
        type=count,
        default=256,
        metavar="N",
        help="largest number of requests that wait for room; one more is answered with 503 (default: 256)",
    )
    sub.add_argument(
        "--add-from",
        type=text,
        metavar="FOLDER",
        help="let clients add adapters of folders below this one, and delete any (default: they may not)",
    )
    sub.add_argument(
        "--device",
        type=device,
        help="device of the model and the adapters (default: cuda if there is one, else cpu)",
    )
    add_dtype(sub, "auto")
    sub.add_argument(
        "--bank-dtype",
        default="float32",
        metavar="TYPE",
        help=f"dtype of the adapters in memory: {', '.join(DTYPES)} (default: float32)",
    )
    add_model_place(sub)
    add_places(sub, "the FOLDERs, those of --bank first")
    add_trust(sub)
