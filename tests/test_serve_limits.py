"""What the server of lortalib.serve bounds, and what it lets clients change."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from adapted import output, picture, same_bits
from banks import prompts, small_llama
from served import Letters, Running, random_tensors, tiny
from test_serve_clients import answer_of, completion, endless, post, until
from transformers.generation.continuous_batching import ContinuousBatchingManager

import lortalib
from lortalib.serve import BusyError, Catalogue, Engine, Request, Server, end_tokens
from lortalib.serve._request import Latest

SHORT = {"model": "base", "prompt": [5, 6], "max_tokens": 2, "temperature": 0}


def head_of(connection):
    """The status and the headers of an answer."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    return status, dict(line.decode().strip().split(": ") for line in iter(file.readline, b"\r\n"))


def test_one_more_than_may_wait_is_turned_away_and_may_come_again():
    with Running(waiting=2) as running, ThreadPoolExecutor(2) as pool:
        running.adapters.put("ann", random_tensors(running.bank, 1))
        with running.engine._manager.pause():
            waiting = [pool.submit(running.complete, "base:ann", [5, 6, k]) for k in range(2)]
            until(lambda: len(running.engine._running) == 2)
            for body in (SHORT, {**SHORT, "stream": True}, {**SHORT, "model": "base:ann"}):
                with running.send(post(json.dumps(body))) as connection:
                    status, headers = head_of(connection)
                    assert (status, headers["Retry-After"]) == (503, "1")
            status, found = running.ask("POST", "/v1/completions", SHORT)
            assert (status, "2 requests wait already" in found["error"]["message"]) == (503, True)
            with pytest.raises(BusyError, match="2 requests wait"):
                running.engine.answer(Request([5]))
            assert len(running.engine._running) == 2
            assert sum(running.adapters._users.values()) == 3  # what was turned away keeps none
        assert [len(each.result()) for each in waiting] == [5, 5]
        assert running.ask("POST", "/v1/completions", SHORT)[0] == 200


def test_requests_that_have_begun_do_not_wait():
    with Running(waiting=1, positions=4010, room=8192) as running:
        forwards = endless(running)
        first = running.send(completion(4000))
        until(lambda: forwards)
        assert running.ask("POST", "/v1/completions", SHORT)[0] == 200
        first.close()


def test_a_request_that_is_turned_away_is_not_read_for_its_tokens():
    with Running(waiting=1) as running:
        running.engine.check_waiting = lambda: (_ for _ in ()).throw(BusyError("full"))
        running.server.tokenizer = None  # it would raise
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert running.ask("POST", path, {**SHORT, "prompt": "a", "messages": []})[0] == 503


def test_a_connection_too_many_is_closed_with_an_answer(monkeypatch):
    monkeypatch.setattr("lortalib.serve._server._CONNECTIONS", 1)
    with Running(waiting=1) as running:
        idle = [running.send(b"") for _ in range(2)]
        until(lambda: running.server._places._value == 0)
        with running.send(b"") as connection:
            status, text = answer_of(connection)
            assert (status, "no connection left" in text) == (503, True)
            assert connection.recv(1) == b""
        idle.pop().close()
        until(lambda: running.server._places._value == 1)
        assert running.ask("POST", "/v1/completions", SHORT)[0] == 200
        idle.pop().close()


def test_a_slow_reader_keeps_one_value():
    latest = Latest()
    assert latest.get(0) is None
    for value in range(1, 6):
        latest.put(value)
    assert latest.get(0) == 5
    assert latest.get(0) is None
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(latest.get, 60)
        latest.put(7)
        assert found.result() == 7


def test_a_reader_that_comes_late_finds_the_whole_answer():
    with Running() as running:
        wanted = running.complete("base", [5, 6, 7], 9)
        updates = running.engine.answer(Request([5, 6, 7], length=9, temperature=0))
        running.rest()
        assert list(updates) == [(wanted, True)]


def test_clients_change_adapters_only_where_they_may(tmp_path):
    adapter = lortalib.nn.apply(tiny(), "indscal", 4)
    inside = adapter.save(tmp_path / "open" / "ann")
    outside = adapter.save(tmp_path / "closed")
    (tmp_path / "open" / "link").symlink_to(outside)
    for add_from, status in ((None, 403), (tmp_path / "open", 200)):
        with Running(add_from=add_from) as running:
            for path in ("ann", str(inside)):
                body = {"name": "ann", "path": path}
                assert running.ask("POST", "/v1/adapters", body)[0] == status
            for path in (str(outside), "../closed", "link", "ann/../../closed"):
                code, found = running.ask("POST", "/v1/adapters", {"name": "eve", "path": path})
                assert code == 403, found
            assert list(running.adapters) == ["ann"] * (status == 200)
            assert running.ask("DELETE", "/v1/adapters/ann")[0] == status


def test_a_repository_is_no_folder_to_add_from(tmp_path):
    with Running(add_from=tmp_path) as running:
        body = {"name": "ann", "path": "user/name"}
        status, found = running.ask("POST", "/v1/adapters", body)
        assert (status, str(tmp_path) in found["error"]["message"]) == (400, True)


def test_adapters_of_a_bank_can_be_named_and_replaced():
    bank = lortalib.nn.bank(small_llama(), "cp", 2)
    bank.update({"ann": bank[None], 3: bank[None]})
    adapters = Catalogue(bank)
    assert list(adapters) == ["ann", "3"]
    begun = adapters.acquire("3")
    adapters.put("3", bank[None])
    assert len(bank) == 3
    adapters.release(begun)
    adapters.delete("ann")
    assert [repr(name) for name in bank] == ["'3'"]
    with pytest.raises(ValueError, match="adapter 'eve' does not fit the bank"):
        adapters.put("eve", {})
    adapters.put("bob", bank[None])
    for name in adapters:  # which changes them under way
        adapters.delete(name)
    assert len(bank) == 0
    bank.update({3: bank[None], "3": bank[None]})
    with pytest.raises(ValueError, match="cannot tell apart"):
        Catalogue(bank)


def test_an_end_is_needed():
    def ends(of_model, of_tokenizer):
        generation = SimpleNamespace(eos_token_id=of_model)
        model = SimpleNamespace(generation_config=generation)
        return end_tokens(model, SimpleNamespace(eos_token_id=of_tokenizer))

    assert ends([7, 2], 2) == [7, 2]
    assert ends(7, 2) == [7, 2]
    assert ends(None, 0) == [0]
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        ends(None, None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ends": []}, "give ends="),
        ({"room": 31}, "a room of at least 32"),
        ({"waiting": 0}, "at least 1 request"),
        ({"width": 0}, "a width of at least 1"),
    ],
)
def test_an_engine_that_could_answer_nothing(options, why):
    model = tiny()
    bank = lortalib.nn.bank(model, "cp", 2)
    with pytest.raises(ValueError, match=why):
        Engine(model, bank, **{"ends": [0], **options})
    with pytest.raises(TypeError, match="bank must be a bank, as"):
        Engine(model, {}, [0])
    with pytest.raises(TypeError, match="model must be a causal language model"):
        Engine(torch.nn.Linear(2, 2), bank, [0])
    with pytest.raises(TypeError, match="engine must be an Engine"):
        Server(None, Letters())


def test_an_engine_that_could_not_start_leaves_the_model(monkeypatch):
    model = tiny()
    bank = lortalib.nn.bank(model, "cp", 2)
    look, attention = picture(model).keys(), model.config._attn_implementation
    expected = output(model, prompts())

    def warmup(manager):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(ContinuousBatchingManager, "warmup", warmup)
        with pytest.raises(MemoryError, match="no room"):
            Engine(model, bank, [0], room=2**20)
    assert (picture(model).keys(), model.config._attn_implementation) == (look, attention)
    assert same_bits(output(model, prompts()), expected)
    engine = Engine(model, bank, [0], room=256)
    assert list(engine.answer(Request([5, 6], length=2)))[-1][1]
    engine.close()


def test_a_model_has_one_engine():
    with Running() as running:
        with pytest.raises(ValueError, match="has an engine already"):
            Engine(running.model, running.bank, [0])
        assert list(running.engine.answer(Request([5, 6], length=2)))[-1][1]


def test_only_the_engine_calls_its_model():
    with Running() as running:
        expected = running.complete("base", [5, 6], 20)
        with ThreadPoolExecutor(1) as pool:
            answers = [pool.submit(running.complete, "base", [5, 6], 20) for _ in range(3)]
            while not all(each.done() for each in answers):
                with pytest.raises(RuntimeError, match=r"engine.answer.*or engine.close"):
                    running.model(**prompts())
        assert [each.result() for each in answers] == [expected] * 3
    running.model(**prompts())


def test_an_answer_that_nobody_begins_to_read_is_given_up(monkeypatch):
    with Running() as running:
        given_up = []
        cancel = running.engine._manager.cancel_request
        monkeypatch.setattr(
            running.engine._manager,
            "cancel_request",
            lambda name: given_up.append(name) or cancel(name),
        )
        running.engine.answer(Request([5, 6], length=500)).close()
        assert given_up == ["0"]


def test_a_request_that_could_not_be_submitted_does_not_wait(monkeypatch):
    with Running() as running:
        monkeypatch.setattr(running.engine._manager, "add_request", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.engine.answer(Request([5, 6], length=2))
        assert not running.engine._running


OPEN_AT_THE_END = """
from banks import random_stack
from served import tiny
import lortalib
from lortalib.serve import Engine, Request

model = tiny()
bank = lortalib.nn.bank(model, "cp", 2)
engine = Engine(model, bank, [0], room=256)
assert list(engine.answer(Request([5, 6], length=2)))[-1][1]
raise SystemExit(3)
"""


def test_a_process_ends_though_an_engine_was_not_closed():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", OPEN_AT_THE_END], env=environment, timeout=120)
    assert done.returncode == 3


def test_an_older_transformers_is_refused(monkeypatch):
    model = tiny()
    bank = lortalib.nn.bank(model, "cp", 2)
    monkeypatch.setattr("lortalib.serve._engine.ContinuousBatchingConfig", SimpleNamespace)
    with pytest.raises(ImportError, match=r"needs transformers 5\.18 or newer"):
        Engine(model, bank, [0])


def test_a_closed_engine_leaves_no_hook():
    with Running() as running:
        running.complete("base", [5])
    hooks = [*running.model._forward_pre_hooks.values(), *running.model._forward_hooks.values()]
    assert not [hook for hook in hooks if getattr(hook, "__self__", None) is running.engine]


def test_a_server_that_stops_waits_for_answers_that_are_being_written():
    with Running() as running:
        server, inside, done = running.server, threading.Event(), threading.Event()

        def write():
            with server.answering():
                inside.set()
                done.wait(60)

        thread = threading.Thread(target=write)
        thread.start()
        inside.wait(60)
        assert not server.wait_for_answers(0)
        done.set()
        assert server.wait_for_answers(60)
        thread.join()


def test_an_address_of_the_newer_kind():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    engine = Engine.__new__(Engine)
    engine.waiting = 1
    with Server(engine, Letters(), "::1") as server:
        assert server.server_address[0] == "::1"


def test_clients_that_ask_again_are_all_answered():
    with Running(waiting=8, width=8) as running, ThreadPoolExecutor(60) as pool:
        refused = []

        def ask(k):
            body = {**SHORT, "prompt": [5, 6, k % 50], "seed": k}
            for _ in range(3000):
                status, found = running.ask("POST", "/v1/completions", body)
                if status == 200:
                    return found["usage"]["completion_tokens"]
                assert status == 503
                refused.append(k)
                time.sleep(0.01)
            raise AssertionError("it was turned away for 30 seconds")

        assert all(found <= 2 for found in pool.map(ask, range(120)))
        assert refused
