"""The server of examples/serve.py under load: nothing is mixed up, nothing is lost."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
import torch
from adapted import put
from banks import random_stack
from serve import Engine, Request, Server
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib

ADAPTERS, REQUESTS = 100, 200


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def tiny():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Running:
    """A server in a thread, and a client."""

    def __init__(self, shared=("in", "out")):
        self.model = tiny()
        options = {"shared": shared, "dtype": torch.float64}
        self.bank = lortalib.nn.bank(self.model, "indscal", 4, **options)
        self.engine = Engine(self.model, self.bank, [0], largest=32)
        self.server = Server(self.engine, Letters())
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.engine.close()

    def ask(self, method, path, body=None):
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=120)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def complete(self, model, prompt, length=5):
        body = {"model": model, "prompt": prompt, "max_tokens": length}
        status, found = self.ask("POST", "/v1/completions", body)
        assert status == 200, found
        return found["choices"][0]["token_ids"]


def random_tensors(bank, seed):
    stack = random_stack(bank, 1, seed)
    return {name: [tensor[0] for tensor in tensors] for name, tensors in stack.items()}


def prompt_of(k):
    draw = torch.Generator().manual_seed(k)
    return torch.randint(1, 60, (3 + k % 5,), generator=draw).tolist()


def alone(running, adapter, prompt, length=5):
    """The answer of an ordinary adapter on a model without a bank."""
    model = LlamaForCausalLM(running.model.config).double().eval()
    model.load_state_dict(running.model.state_dict())
    if adapter is not None:
        own = put(model, "indscal", 4, dtype=torch.float64)
        own.networks.load_state_dict(adapter.networks.state_dict())
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=[0],
        pad_token_id=0,
    )
    tokens = out[0, len(prompt) :].tolist()
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


@pytest.mark.parametrize("shared", [("in", "out"), ()], ids=["shared", "own"])
def test_a_load_of_adapters_that_are_replaced_under_way(shared):
    with Running(shared) as running:
        bank = running.bank
        for k in range(ADAPTERS):
            bank[f"u{k}"] = random_tensors(bank, k)
        wanted = {
            k: {tuple(alone(running, bank.adapter(f"u{k}"), prompt_of(k)))} for k in range(ADAPTERS)
        }
        renewed = range(0, ADAPTERS, 10)  # these have another answer once they are replaced
        fresh = lortalib.nn.bank(tiny(), "indscal", 4, shared=shared, dtype=torch.float64)
        for own, other in zip(fresh.shared.values(), bank.shared.values()):
            for one, value in zip(own, other):
                one.copy_(value)
        for k in renewed:
            fresh[k] = random_tensors(bank, 1000 + k)
            wanted[k].add(tuple(alone(running, fresh.adapter(k), prompt_of(k))))
        done = threading.Event()

        def replace():
            while not done.is_set():
                for k in renewed:
                    bank[f"u{k}"] = fresh[k]
                    bank[f"u{k}"] = random_tensors(bank, k)
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
        assert running.complete("base", prompt_of(1)) == alone(running, None, prompt_of(1))


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
            ("POST", "/v1/completions", {"prompt": [5], "temperature": 1}, 400, "greedily"),
            ("POST", "/v1/completions", ["base"], 400, "must be a JSON object"),
            ("POST", "/v1/adapters", {"name": "x"}, 400, "'path' must be of the type str"),
            ("POST", "/v1/adapters", {"name": "x", "path": str(tmp_path)}, 400, "adapter"),
            ("DELETE", "/v1/adapters/ann", None, 404, "does not exist"),
            ("GET", "/v1/other", None, 404, "there is no GET"),
        ):
            code, found = running.ask(method, path, body)
            assert code == status, (path, body, found)
            assert why in found["error"]["message"]
        assert running.complete("base", [5, 6, 7]) == alone(running, None, [5, 6, 7])


def test_an_adapter_that_is_deleted_while_its_request_waits_is_a_404():
    with Running() as running:
        running.bank["ann"] = random_tensors(running.bank, 1)
        gather = running.bank._store.gather

        def deleted_meanwhile(names):
            if "ann" in running.bank:
                del running.bank["ann"]
            return gather(names)

        running.bank._store.gather = deleted_meanwhile
        body = {"model": "base:ann", "prompt": [5]}
        status, found = running.ask("POST", "/v1/completions", body)
        assert (status, "does not exist" in found["error"]["message"]) == (404, True)
        assert running.complete("base", [5]) == alone(running, None, [5])


def test_requests_that_fit_the_positions_only_alone_are_in_batches_of_their_own():
    with Running() as running:
        long = Request([5] * 50, None, 4)
        requests = [Request([5], None, 40), long, Request([6], None, 4), Request([7] * 9, None, 9)]
        parts = running.engine._parts(requests)
        assert [[requests.index(each) for each in part] for part in parts] == [[0, 2, 3], [1]]


def test_names_in_paths_are_quoted():
    with Running() as running:
        running.bank["ann b/c"] = random_tensors(running.bank, 1)
        status, found = running.ask("DELETE", "/v1/adapters/ann%20b%2Fc")
        assert (status, found["deleted"]) == (200, True)
