"""The server of lortalib.serve under load: nothing is mixed up, nothing is lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapted import put
from served import Letters, Running, alone, random_tensors, tiny

import lortalib

ADAPTERS, REQUESTS = 100, 200


def prompt_of(k):
    draw = torch.Generator().manual_seed(k)
    return torch.randint(1, 60, (3 + k % 5,), generator=draw).tolist()


@pytest.mark.parametrize("shared", [("in", "out"), ()], ids=["shared", "own"])
def test_a_load_of_adapters_that_are_replaced_under_way(shared):
    with Running(shared) as running:
        bank = running.bank
        adapters = running.adapters
        for k in range(ADAPTERS):
            adapters.put(f"u{k}", random_tensors(bank, k))
        wanted = {
            k: {tuple(alone(running, adapters.adapter(f"u{k}"), prompt_of(k)))}
            for k in range(ADAPTERS)
        }
        renewed = range(0, ADAPTERS, 10)  # these have another answer once they are replaced
        fresh = lortalib.nn.bank(tiny(), "indscal", 4, shared=shared, dtype=torch.float64)
        for own, other in zip(fresh.shared.values(), bank.shared.values()):
            for one, value in zip(own, other):
                one.copy_(value)
        for k in renewed:
            fresh[k] = random_tensors(bank, 1000 + k)
            wanted[k].add(tuple(alone(running, fresh.adapter(k), prompt_of(k))))
        done, batches = threading.Event(), []
        running.model.register_forward_hook(lambda *_: batches.append(running.engine._batch()))

        def replace():
            while not done.is_set():
                for k in renewed:
                    adapters.put(f"u{k}", fresh[k])
                    adapters.put(f"u{k}", random_tensors(bank, k))
                done.wait(0.01)

        replacing = threading.Thread(target=replace)
        replacing.start()
        try:
            with ThreadPoolExecutor(REQUESTS) as pool:
                asked = [k % ADAPTERS for k in range(REQUESTS)]
                found = list(
                    pool.map(lambda k: running.complete(f"base:u{k}", prompt_of(k)), asked)
                )
        finally:
            done.set()
            replacing.join()
        assert len(found) == REQUESTS
        for k, tokens in zip(asked, found):
            assert tuple(tokens) in wanted[k], k
        assert len({tuple(tokens) for tokens in found}) > ADAPTERS // 2
        assert max(len({request.version for request, _ in each}) for each in batches) > 10
        assert running.complete("base", prompt_of(1)) == alone(running, None, prompt_of(1))
    assert len(bank) == ADAPTERS  # what was replaced is gone


def test_adapters_come_and_go_and_unknown_ones_are_a_404(tmp_path):
    with Running() as running:
        adapter = put(tiny(), "indscal", 4, seed=1, dtype=torch.float64)
        folder = adapter.save(tmp_path / "ann")
        assert running.ask("GET", "/v1/models")[1]["data"] == [{"id": "base", "object": "model"}]
        status, found = running.ask("POST", "/v1/adapters", {"name": "ann", "path": str(folder)})
        assert (status, found["id"]) == (200, "base:ann")
        answer = running.complete("base:ann", [5, 6, 7])
        assert answer == alone(running, adapter, [5, 6, 7])
        assert running.complete("base:ann", "abc", 2) == alone(
            running, adapter, Letters()("abc")["input_ids"], 2
        )
        assert running.ask("DELETE", "/v1/adapters/ann")[1]["deleted"]
        for method, path, body, status, why in (
            (
                "POST",
                "/v1/completions",
                {"model": "base:ann", "prompt": [5]},
                404,
                "does not exist",
            ),
            ("POST", "/v1/completions", {"model": "other", "prompt": [5]}, 404, "does not exist"),
            ("POST", "/v1/completions", {"model": "base", "prompt": []}, 400, "not empty"),
            ("POST", "/v1/completions", {"model": "base", "prompt": [64]}, 400, "from 0 to 63"),
            ("POST", "/v1/completions", {"prompt": [5], "max_tokens": 0}, 400, "must be positive"),
            ("POST", "/v1/completions", {"prompt": [5] * 60}, 400, "64 positions"),
            ("POST", "/v1/completions", {"prompt": [5] * 60, "max_tokens": 5}, 400, "64 positions"),
            ("POST", "/v1/completions", {"model": "base:", "prompt": [5]}, 404, "does not exist"),
            ("POST", "/v1/completions", {"prompt": [True]}, 400, "from 0 to 63"),
            ("POST", "/v1/completions", {"prompt": [5], "stop": [""]}, 400, "list of texts"),
            ("POST", "/v1/completions", {"prompt": [5], "seed": -(2**63) - 1}, 400, "64 bits"),
            ("POST", "/v1/completions", {"prompt": [5], "temperature": -1}, 400, "0 or more"),
            ("POST", "/v1/completions", {"prompt": [5], "top_p": 0}, 400, "above 0"),
            ("POST", "/v1/completions", {"prompt": [5], "stop": [1]}, 400, "list of texts"),
            ("POST", "/v1/completions", {"prompt": [5], "n": 2}, 400, "one answer"),
            ("POST", "/v1/chat/completions", {"messages": []}, 400, "no chat template"),
            ("POST", "/v1/completions", ["base"], 400, "must be a JSON object"),
            ("POST", "/v1/completions", {"prompt": [5], "seed": 2**64}, 400, "64 bits"),
            ("POST", "/v1/completions", {"prompt": [5], "stream": "yes"}, 400, "'stream' must"),
            ("POST", "/v1/adapters", {"name": "", "path": "x"}, 400, "'name' must not be empty"),
            ("POST", "/v1/other", {"prompt": [5]}, 404, "there is no POST"),
            ("POST", "/v1/adapters", {"name": "x"}, 400, "'path' must be of the type str"),
            ("POST", "/v1/adapters", {"name": "x", "path": str(tmp_path)}, 400, "adapter"),
            ("DELETE", "/v1/adapters/ann", None, 404, "does not exist"),
            ("GET", "/v1/other", None, 404, "there is no GET"),
        ):
            code, found = running.ask(method, path, body)
            assert code == status, (path, body, found)
            assert why in found["error"]["message"]
        assert running.complete("base", [5, 6, 7]) == alone(running, None, [5, 6, 7])


@pytest.mark.parametrize("replaced", [True, False])
def test_a_request_keeps_the_adapter_that_it_began_with(replaced):
    with Running() as running, ThreadPoolExecutor(1) as pool:
        old, new = (random_tensors(running.bank, k) for k in (1, 2))
        running.adapters.put("ann", old)
        wanted = alone(running, running.adapters.adapter("ann"), prompt_of(1))
        with running.engine._manager.pause():
            found = pool.submit(running.complete, "base:ann", prompt_of(1))
            while not running.engine._running:
                time.sleep(0.01)
            running.adapters.put("ann", new) if replaced else running.adapters.delete("ann")
            assert len(running.bank) == 1 + replaced
        assert found.result() == wanted
        running.rest()
        assert len(running.bank) == replaced
        body = {"model": "base:ann", "prompt": prompt_of(1), "temperature": 0}
        status, found = running.ask("POST", "/v1/completions", body)
        if replaced:
            wanted = alone(running, running.adapters.adapter("ann"), prompt_of(1))
            assert found["choices"][0]["token_ids"][:5] == wanted
        else:
            assert (status, "does not exist" in found["error"]["message"]) == (404, True)


def test_a_seed_gives_one_answer_in_any_company():
    prompt = list(range(2, 12))  # longer than a forward is wide, and so divided among several
    with Running(width=8) as running, ThreadPoolExecutor(20) as pool:
        options = {"temperature": 2.0, "top_p": 0.9, "length": 12}
        wanted = [running.complete("base", prompt, seed=seed, **options) for seed in range(4)]
        asked = [
            pool.submit(running.complete, "base", prompt, seed=k % 4, **options) for k in range(20)
        ]
        assert [each.result() for each in asked] == wanted * 5
        assert len({*map(tuple, wanted)}) == 4
        again = [tuple(running.complete("base", prompt, **options)) for _ in range(4)]
        assert len({*again}) == 4


def test_requests_that_do_not_fit_together_are_all_answered():
    with Running(room=160, width=64) as running, ThreadPoolExecutor(12) as pool:
        for k in range(3):
            running.adapters.put(f"u{k}", random_tensors(running.bank, k))
        wanted = [alone(running, running.adapters.adapter(f"u{k}"), [5, 6], 50) for k in range(3)]
        asked = [pool.submit(running.complete, f"base:u{k % 3}", [5, 6], 50) for k in range(12)]
        assert [each.result() for each in asked] == wanted * 4


def test_streamed_pieces_are_the_answer():
    with Running() as running:
        body = {"prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0}
        whole = running.ask("POST", "/v1/completions", body)[1]["choices"][0]
        # The engine waits, since a reader that is slower skips tokens.
        running.model.register_forward_hook(lambda *_: time.sleep(0.05))
        pieces = [each["choices"][0] for each in running.events("/v1/completions", body)]
        assert len(pieces) > 3
        assert "".join(each["text"] for each in pieces) == whole["text"]
        assert [each["finish_reason"] for each in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_an_answer_ends_before_a_stop_text_and_its_request_is_given_up():
    with Running() as running:
        body = {"prompt": [5, 6, 7], "max_tokens": 50, "temperature": 0}
        text = running.ask("POST", "/v1/completions", body)[1]["choices"][0]["text"]
        stop = text[20:23]
        tokens = []

        def slowly(*_):
            tokens.extend(running.engine._batch())
            time.sleep(0.01)  # such that the server reads a token before the next ones are there

        running.model.register_forward_hook(slowly)
        for path in ("whole", "streamed"):
            if path == "whole":
                found = running.ask("POST", "/v1/completions", {**body, "stop": stop})[1]["choices"]
            else:
                events = running.events("/v1/completions", {**body, "stop": [stop, "none"]})
                found = [each["choices"][0] for each in events]
            assert "".join(each["text"] for each in found) == text[: text.index(stop)]
            assert found[-1]["finish_reason"] == "stop"
        running.rest()
        assert len(tokens) < 50
        stream = running.server._complete({**body, "stream": True}, lambda: False)
        next(stream)
        stream.close()
        running.rest()
        assert len(tokens) < 2 * 50


def template(messages, add_generation_prompt, tokenize):
    assert not tokenize
    return messages[0]["content"] + ">" * add_generation_prompt


def test_chats_go_through_the_template():
    with Running() as running:
        tokenizer = running.server.tokenizer
        tokenizer.chat_template = "a template"
        tokenizer.apply_chat_template = template
        messages = [{"role": "user", "content": "ab"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 16}
        status, found = running.ask("POST", "/v1/chat/completions", body)
        parts = running.events("/v1/chat/completions", body)
        assert (status, found["object"]) == (200, "chat.completion")
        ids = Letters()("ab>", add_special_tokens=False)["input_ids"]
        wanted = alone(running, None, ids, 16)
        content = found["choices"][0]["message"]["content"]
        assert content == Letters().decode(wanted)
        assert "".join(each["choices"][0]["delta"]["content"] for each in parts) == content
        body = {"messages": messages, "temperature": 0, "max_completion_tokens": 2}
        body = {**body, "stop": None, "seed": None, "max_tokens": None}  # as if they were not there
        found = running.ask("POST", "/v1/chat/completions", body)[1]
        assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert found["model"] == "base"
        for wrong, why in (([], "do not fit"), ([{"content": "a" * 70}], "64 positions")):
            status, found = running.ask("POST", "/v1/chat/completions", {"messages": wrong})
            assert (status, why in found["error"]["message"]) == (400, True), found
        tokenizer.apply_chat_template = lambda messages, **options: ""
        status, found = running.ask("POST", "/v1/chat/completions", {"messages": messages})
        assert (status, "is empty" in found["error"]["message"]) == (400, True)


@pytest.mark.parametrize(("room", "length"), [(4096, 61), (32, 29)], ids=["positions", "room"])
def test_a_chat_without_a_length_has_all_that_fits(room, length):
    with Running(room=room) as running:
        tokenizer = running.server.tokenizer
        tokenizer.chat_template = "a template"
        tokenizer.apply_chat_template = lambda messages, **options: "ab>"
        running.model.lm_head.register_forward_hook(lambda m, x, y: y[..., 0].fill_(-1e9) and None)
        found = running.ask("POST", "/v1/chat/completions", {"messages": [{}], "temperature": 0})[1]
        assert found["usage"]["completion_tokens"] == length
        found = running.ask("POST", "/v1/completions", {"prompt": "ab>", "temperature": 0})[1]
        assert found["usage"]["completion_tokens"] == 16


@pytest.mark.filterwarnings("error")
def test_a_forward_that_raises_is_an_error_and_nobody_waits():
    with Running() as running:
        running.adapters.put("ann", random_tensors(running.bank, 1))
        running.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        for why in ("division by zero", "no more requests"):
            status, found = running.ask(
                "POST", "/v1/completions", {"model": "base:ann", "prompt": [5]}
            )
            assert (status, why in found["error"]["message"]) == (500, True), found
        assert not running.engine._running


def test_names_in_paths_are_quoted():
    with Running() as running:
        running.adapters.put("ann b/c", random_tensors(running.bank, 1))
        status, found = running.ask("DELETE", "/v1/adapters/ann%20b%2Fc")
        assert (status, found["deleted"]) == (200, True)
