"""Speaks HTTP: reads JSON, writes JSON or events of JSON, and notices clients that leave."""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from typing import Any
from urllib.parse import unquote

LARGEST = 2**22  # bytes of a body
AGAIN = {"Retry-After": "1"}  # seconds after which one who was turned away may ask again
HasGone = Callable[[], bool]


class HttpError(Exception):
    """An answer with an error status, as OpenAI's servers give it."""

    def __init__(self, message: str, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's servers give it."""
    return {"error": {"message": message, "code": status}}


def take(body: dict[str, Any], key: str, kinds: Any, default: Any = ...) -> Any:
    """Return a field of a request; an error says which is missing or of another type."""
    value = body.get(key)
    if value is None and default is not ...:
        return default
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise HttpError(f"{key!r} must be of the type {names}; found {value!r}", 400)
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
        raise HttpError("a text has half of a surrogate pair, so it is no Unicode", 400) from error
    except (ValueError, RecursionError) as error:
        raise HttpError(f"the body is not JSON: {error}", 400) from error
    if not isinstance(body, dict):
        raise HttpError("the body must be a JSON object", 400)
    return body


class JsonServer(ThreadingHTTPServer):
    """Listens at an address; a thread answers each connection.

    Args:
        host: the address of this machine to listen at.
        port: the port; 0 for any that is free.
        connections: the largest number of connections; one more is closed with a 503.

    Attributes:
        gets: what answers a GET, by path.
        posts: what answers a POST, by path, given the body and a function that tells whether the client has
            gone.
        deletes: what answers a DELETE, by the path up to the last slash, given the name behind it.
    """

    gets: dict[str, Callable[[], Any]]
    posts: dict[str, Callable[[dict[str, Any], HasGone], Any]]
    deletes: dict[str, Callable[[str], Any]]

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, host: str, port: int, connections: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(connections)
        self._answers = 0
        self._changed = threading.Condition()
        super().__init__((host, port), Handler)

    def routes(self) -> str:
        """List what the server answers."""
        found: dict[str, Iterable[str]] = {
            "GET": self.gets,
            "POST": self.posts,
            "DELETE": [f"{p}/NAME" for p in self.deletes],
        }
        return ", ".join(f"{verb} {path}" for verb, paths in found.items() for path in paths)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread; turn one that is too many away without one."""
        if not self._places.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(_TURNED_AWAY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer that is being written."""
        with self._changed:
            self._answers += 1
        try:
            yield
        finally:
            with self._changed:
                self._answers -= 1
                self._changed.notify_all()

    def wait_for_answers(self, seconds: float) -> bool:
        """Wait until no answer is being written; return False if one still is after ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._answers, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error, unless it is that the client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


_WHY = json.dumps(error_body(503, "the server has no connection left; try again in a moment"))
_TURNED_AWAY = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    f"Retry-After: {AGAIN['Retry-After']}\r\nContent-Length: {len(_WHY)}\r\n\r\n{_WHY}"
).encode()


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
        delete = self.server.deletes.get(folder) if name else None
        self._answer({self.path: lambda: delete(unquote(name))} if delete else {})

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
            raise HttpError("send the body in one piece, with its Content-Length", 411)
        if not (length.isascii() and length.isdigit()):
            raise HttpError(f"Content-Length must be a number of bytes; found {length!r}", 400)
        if len(length) > 20 or int(length) > LARGEST:
            raise HttpError(f"the body may have at most {LARGEST:,} bytes; it has {length}", 413)
        try:
            data = self.rfile.read(int(length))
        except TimeoutError:
            raise HttpError(f"the body did not come within {self.timeout:g} seconds", 408) from None
        self._unread = False
        return parse(data)

    def _answer(self, routes: dict[str, Callable[[], Any]]) -> None:
        with self.server.answering():
            self._answer_from(routes)

    def _answer_from(self, routes: dict[str, Callable[[], Any]]) -> None:
        status, headers = 200, {}
        self._unread = {"Content-Length", "Transfer-Encoding"} & {*self.headers} != set()
        try:
            if self.path not in routes:
                raise HttpError(
                    f"there is no {self.command} {self.path}; the server has {self.server.routes()}",
                    404,
                )
            found = routes[self.path]()
            # A generator that has not begun cannot give its request up.
            first = next(found) if isinstance(found, Iterator) else None
        except HttpError as error:
            status, headers = error.status, dict(error.headers)
            found = error_body(status, str(error))
        except ConnectionError:  # the client has gone
            self.close_connection = True
            return
        except Exception as error:
            status, found = 500, error_body(500, repr(error))
        # What nobody read of a body would be taken for the next request.
        self.close_connection |= self._unread
        if isinstance(found, Iterator):
            self._stream(first, found)
        else:
            self._send(status, headers, json.dumps(found).encode())

    def _send(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
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
            self.wfile.write(f"data: {json.dumps(error_body(500, repr(error)))}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
