"""The server of lortalib.serve on a tiny model, and what an ordinary adapter answers."""

import json
import socket
import threading
import time
from http.client import HTTPConnection

import torch
from adapted import put
from banks import random_stack
from transformers import LlamaConfig, LlamaForCausalLM

import lortalib
from lortalib.serve import Engine, Server


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=True):
        ids = [1 + ord(letter) % 60 for letter in text]
        return {"input_ids": [1] * add_special_tokens + ids}

    chat_template = None

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(map(str, tokens))


def tiny(positions=64):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Running:
    """A server in a thread, and a client."""

    def __init__(
        self, shared=("in", "out"), room=4096, width=1024, positions=64, waiting=256, add_from="/"
    ):
        self.model = tiny(positions)
        options = {"shared": shared, "dtype": torch.float64}
        self.bank = lortalib.nn.bank(self.model, "indscal", 4, **options)
        self.engine = Engine(self.model, self.bank, [0], room, width, waiting)
        self.adapters = self.engine.adapters
        self.server = Server(self.engine, Letters(), add_from=add_from)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
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

    def complete(self, model, prompt, length=5, **options):
        body = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, **options}
        status, found = self.ask("POST", "/v1/completions", body)
        assert status == 200, found
        return found["choices"][0]["token_ids"]

    def events(self, path, body):
        """The events of a streamed answer."""
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=120)
        try:
            connection.request("POST", path, json.dumps({"stream": True, **body}))
            answer = connection.getresponse()
            assert answer.getheader("Content-Type") == "text/event-stream"
            lines = answer.read().decode().split("\n\n")
        finally:
            connection.close()
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def send(self, data):
        """Open a connection and send bytes; the connection."""
        connection = socket.create_connection(("127.0.0.1", self.server.server_port), timeout=120)
        connection.sendall(data)
        return connection

    def rest(self):
        """Wait until no request is left."""
        while self.engine._running:
            time.sleep(0.01)


def random_tensors(bank, seed):
    stack = random_stack(bank, 1, seed)
    return {name: [tensor[0] for tensor in tensors] for name, tensors in stack.items()}


def alone(running, adapter, prompt, length=5):
    """The answer of an ordinary adapter on a model without a bank."""
    model = tiny(running.model.config.max_position_embeddings)
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
