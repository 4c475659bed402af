"""Clients of lortalib.serve that leave, ask for too much, or send what is no request."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import Running, random_tensors

from lortalib.serve._http import LARGEST

LONG = 4000  # new tokens: minutes of work


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 seconds")


def post(body, *headers, path="/v1/completions"):
    """The bytes of a request."""
    body = body if isinstance(body, bytes) else body.encode()
    headers = headers or (f"Content-Length: {len(body)}",)
    return "\r\n".join([f"POST {path} HTTP/1.1", *headers, "", ""]).encode() + body


def completion(length, model="base", stream="false"):
    return post(
        f'{{"model": "{model}", "prompt": [5, 6], "max_tokens": {length}, "stream": {stream}}}'
    )


def endless(running):
    """Let no request reach its end token; return a list that grows by an entry with each forward."""
    forwards = []

    def slowly(module, args, output):
        time.sleep(0.002)
        forwards.append(len(running.engine._batch()))
        output[..., 0] = -1e9

    running.model.lm_head.register_forward_hook(slowly)
    return forwards


def with_a_reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("leave", [socket.socket.close, with_a_reset])
def test_a_client_that_leaves_is_given_up(leave, stream):
    with Running(positions=LONG + 10, room=LONG + 32) as running:
        forwards = endless(running)
        running.adapters.put("ann", random_tensors(running.bank, 1))
        wanted = running.complete("base", [5, 6, 7])
        connection = running.send(completion(LONG, "base:ann", stream))
        until(lambda: len(forwards) > 10)
        running.adapters.delete("ann")
        assert len(running.bank) == 1  # the request has it still
        leave(connection)
        until(lambda: not running.engine._running)
        assert len(running.bank) == 0
        assert len(forwards) < LONG / 2
        assert running.complete("base", [5, 6, 7]) == wanted


def test_a_client_that_leaves_before_its_turn_is_given_up():
    with Running(positions=LONG + 10, room=LONG + 32) as running:
        forwards = endless(running)
        with running.engine._manager.pause():
            connection = running.send(completion(LONG))
            until(lambda: running.engine._running)
            connection.close()
            until(lambda: not running.engine._manager.cancel_queue.empty())
        until(lambda: not running.engine._running)
        assert len(forwards) <= 1


def test_those_that_wait_for_the_room_of_one_who_leaves_get_it():
    with Running(positions=LONG, room=160) as running, ThreadPoolExecutor(1) as pool:
        endless(running)
        wanted = running.complete("base", [5, 6], 90)
        first = running.send(completion(150))
        until(lambda: running.engine._running)
        second = pool.submit(running.complete, "base", [5, 6], 90)
        # Both do not fit: the second has to wait for the end of the first.
        until(lambda: running.engine._scheduler.block_new_requests)
        first.close()
        assert second.result(60) == wanted


def test_what_does_not_fit_the_room_is_refused_and_the_others_are_answered():
    with Running(positions=LONG, room=100) as running:  # three pages of 32 tokens
        endless(running)
        assert running.engine.room == 96
        for prompt, length in ([5] * 30, 67), ([5] * 95, 2), ([5] * 96, 1):
            assert len(running.complete("base", prompt, length)) == length
        for prompt, length in ([5] * 30, 68), ([5] * 97, 1), ([5], 10**30):
            body = {"prompt": prompt, "max_tokens": length}
            status, found = running.ask("POST", "/v1/completions", body)
            assert status == 400
            assert "room for 96" in found["error"]["message"] or length > LONG
        assert len(running.complete("base", [5], 3)) == 3


#: Requests that are none, the status of their answer, a part of it, and whether the connection is closed.
REFUSED = {
    "no JSON": (post("{"), 400, "is not JSON", False),
    "nothing": (post(""), 400, "is not JSON", False),
    "no text": (post(b"\xff\xfe\xfd"), 400, "is not JSON", False),
    "deep": (post("[" * 100_000), 400, "is not JSON", False),
    "many digits": (post(f'{{"max_tokens": {"9" * 5000}}}'), 400, "is not JSON", False),
    "list": (post("[1]"), 400, "must be a JSON object", False),
    "half a pair": (post('{"prompt": "\\ud83d"}'), 400, "surrogate", False),
    "half in a name": (post('{"prompt": "a", "model": "\\udc00"}'), 400, "surrogate", False),
    "half in a key": (post('{"\\udc00": 1}'), 400, "surrogate", False),
    "half in a path": (
        post('{"name": "a", "path": "\\udc00"}', path="/v1/adapters"),
        400,
        "surrogate",
        False,
    ),
    "kinds": (post('{"prompt": {"a": 1}}'), 400, "a text or a list", False),
    "mixed": (post('{"prompt": ["a", 1]}'), 400, "token ids", False),
    "temperature": (post('{"prompt": "a", "temperature": 1e400}'), 400, "temperature", False),
    "long": (post(f'{{"prompt": "a", "top_p": {"9" * 400}}}'), 400, "top_p", False),
    "NaN": (post('{"prompt": "a", "temperature": NaN}'), 400, "temperature", False),
    "chunks": (
        post("2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        411,
        "Content-Length",
        True,
    ),
    "negative": (post("{}", "Content-Length: -2"), 400, "Content-Length", True),
    "no number": (post("{}", "Content-Length: 1_0"), 400, "Content-Length", True),
    "power": (
        post("{}", "Content-Length: \xb2").replace(b"\xc2", b""),
        400,
        "Content-Length",
        True,
    ),
    "largest": (post(b" " * LARGEST), 400, "is not JSON", False),
    "large": (post("{}", f"Content-Length: {2**40}"), 413, "at most", True),
    "larger": (post("{}", f"Content-Length: {'9' * 5000}"), 413, "at most", True),
    "unread": (post("{}", path="/v1/other"), 404, "there is no POST", True),
    "body of a GET": (
        b"GET /v1/models HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        200,
        "base",
        True,
    ),
}


def answer_of(connection, closed=None):
    """The status and the body of an answer, which says whether the connection is closed."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = dict(line.decode().strip().split(": ") for line in iter(file.readline, b"\r\n"))
    assert closed in (None, headers.get("Connection") == "close")
    return status, file.read(int(headers["Content-Length"])).decode()


def test_what_is_no_request_is_refused_and_nothing_is_left_in_the_connection():
    with Running() as running:
        for why, (data, wanted, part, closed) in REFUSED.items():
            with running.send(data) as connection:
                status, text = answer_of(connection, closed)
                assert (status, part in text) == (wanted, True), (why, status, text)
                if closed:
                    assert connection.recv(1) == b"", why
                else:
                    connection.sendall(completion(2))
                    assert answer_of(connection)[0] == 200, why


def test_a_forward_that_raises_within_a_streamed_answer_is_said_in_it():
    with Running() as running:
        left = [3]

        def slowly(module, args, output):
            time.sleep(0.05)  # such that the first token is sent
            output[..., 0] = -1e9
            left[0] -= 1
            return output if left[0] else 1 / 0

        running.model.lm_head.register_forward_hook(slowly)
        with running.send(completion(9, stream="true")) as connection:
            first, *_, last = connection.makefile().read().split("data: ")[1:]
        assert '"finish_reason": null' in first
        assert "division by zero" in last


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("lortalib.serve._http.Handler.timeout", 0.1)
    with Running() as running:
        with running.send(post("{", "Content-Length: 9")) as connection:
            assert answer_of(connection)[0] == 408
        with running.send(b"POST /v1/completions HTTP/1.1\r\n") as connection:
            assert connection.recv(1) == b""


def test_a_client_that_leaves_with_its_body_unsent_is_no_error(capfd):
    with Running() as running:
        for cut in (20, 60, -1):
            running.send(completion(2)[:cut]).close()
        with_a_reset(running.send(completion(2)))
        assert len(running.complete("base", [5, 6], 2)) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_adapters_are_deleted_and_renewed_while_clients_come_and_leave():
    with Running(positions=LONG + 10, room=LONG + 32) as running:
        endless(running)
        names = ["ann", "bob"]
        tensors = {name: random_tensors(running.bank, k) for k, name in enumerate(names)}

        def ask(k):
            connection = running.send(completion(2 + k % 30, f"base:{names[k % 2]}"))
            if k % 3:
                time.sleep(0.001 * (k % 7))
                connection.close()
                return 0
            with connection:
                return answer_of(connection)[0]

        def renew(k):
            running.adapters.put(names[k % 2], tensors[names[k % 2]])
            if k % 4 == 3:
                running.adapters.delete(names[0])
                running.adapters.delete(names[1])

        with ThreadPoolExecutor(16) as pool:
            found = pool.map(ask, range(120))
            for k in range(40):
                renew(k)
                time.sleep(0.01)
            assert set(found) <= {0, 200, 404}
        until(lambda: not running.engine._running)
        assert len(running.bank) == 0
        assert not running.adapters._users
