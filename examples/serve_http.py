"""HTTP of examples/serve.py: reads JSON, writes JSON or events of JSON, and notices clients that leave."""

from __future__ import annotations

import json
import selectors
import socket
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any
from urllib.parse import unquote

LARGEST = 2**24  # bytes of a body
HasGone = Callable[[], bool]


class HttpError(Exception):
    """An answer with an error status, as OpenAI's servers give it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def take(body: dict[str, Any], key: str, kinds: Any, default: Any = ...) -> Any:
    """Return a field of a request; an error says which is missing or of another type."""
    value = body.get(key)
    if value is None and default is not ...:
        return default
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise HttpError(400, f"{key!r} must be of the type {names}; found {value!r}")
    return value


def take_number(body: dict[str, Any], key: str, default: float) -> float:
    """Return a number of a request; one that is too large for a float is infinity."""
    try:
        return float(take(body, key, (int, float), default))
    except OverflowError:
        return float("inf")


def parse(data: bytes) -> dict[str, Any]:
    """Read a body, which is a JSON object."""
    try:
        body = json.loads(data)
        # JSON can escape half of a surrogate pair, which no tokenizer and no path can encode.
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HttpError(400, "a text has half of a surrogate pair, so it is no Unicode") from error
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise HttpError(400, "the body must be a JSON object")
    return body


class JsonServer(ThreadingHTTPServer):
    """Listens on the loopback; a thread answers each connection.

    Args:
        port: the port; 0 for any that is free.

    Attributes:
        gets: what answers a GET, by path.
        posts: what answers a POST, by path, given the body and a function that tells whether the client has
            gone.
    """

    gets: dict[str, Callable[[], Any]]
    posts: dict[str, Callable[[dict[str, Any], HasGone], Any]]

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)

    def delete(self, name: str) -> dict[str, Any]:
        """Answer DELETE /v1/adapters/NAME."""
        raise NotImplementedError

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error, unless it is that the client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: JsonServer
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds that a client may neither send nor read

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer(self.server.gets)

    def do_POST(self) -> None:
        """Answer a POST."""
        post = self.server.posts.get(self.path)
        self._answer({self.path: lambda: post(self._body(), self._has_gone)} if post else {})

    def do_DELETE(self) -> None:
        """Answer a DELETE."""
        folder, _, name = self.path.rpartition("/")
        known = folder == "/v1/adapters" and name
        self._answer({self.path: lambda: self.server.delete(unquote(name))} if known else {})

    def _has_gone(self) -> bool:
        """Whether the client has closed its side of the connection."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            if not selector.select(0):
                return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers:
            raise HttpError(411, "send the body in one piece, with its Content-Length")
        if not (length.isascii() and length.isdigit()):
            raise HttpError(400, f"Content-Length must be a number of bytes; found {length!r}")
        if len(length) > 20 or int(length) > LARGEST:
            raise HttpError(413, f"the body may have at most {LARGEST:,} bytes; it has {length}")
        try:
            data = self.rfile.read(int(length))
        except TimeoutError:
            raise HttpError(408, f"the body did not come within {self.timeout:g} seconds") from None
        self._unread = False
        return parse(data)

    def _answer(self, routes: dict[str, Callable[[], Any]]) -> None:
        status = 200
        self._unread = {"Content-Length", "Transfer-Encoding"} & {*self.headers} != set()
        try:
            if self.path not in routes:
                raise HttpError(404, f"there is no {self.command} {self.path}")
            found = routes[self.path]()
            # A generator that has not begun cannot give its request up.
            first = next(found) if isinstance(found, Iterator) else None
        except HttpError as error:
            status, found = error.status, {"error": {"message": str(error), "code": error.status}}
        except ConnectionError:  # the client has gone
            self.close_connection = True
            return
        except Exception as error:
            status, found = 500, {"error": {"message": repr(error), "code": 500}}
        # What nobody read of a body would be taken for the next request.
        self.close_connection |= self._unread
        if isinstance(found, Iterator):
            self._stream(first, found)
        else:
            self._send(status, json.dumps(found).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, first: Any, chunks: Iterator[dict[str, Any]]) -> None:
        """Write server-sent events, and close the connection: nobody knows the length before."""
        self.close_connection = True
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for chunk in chain([first], chunks):
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:  # the client has gone
            chunks.close()  # type: ignore[attr-defined]
        except Exception as error:
            found = {"error": {"message": repr(error), "code": 500}}
            self.wfile.write(f"data: {json.dumps(found)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
