"""The command `serve`: a model and adapters from folders, asked over HTTP."""

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from hub_folders import WORDS, tiny_llama, tiny_roberta
from test_serve_clients import until
from transformers import AutoModelForCausalLM

import lortalib
from lortalib.cli import _serve, main
from lortalib.cli._parser import make_parser
from lortalib.serve import Engine, Server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a model, of two adapters, and of a bank with both; what each adapter says."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    bank, said = None, {None: greedy(model)}
    for seed, name in enumerate(("ann", "bob")):
        generator = torch.Generator().manual_seed(seed)
        adapter = lortalib.nn.apply(
            model, "cp", 2, init="normal", alpha=0.5, generator=generator, name=name
        )
        said[name] = greedy(model)
        adapter.save(folder / name)
        bank = bank or lortalib.nn.bank_like(model, adapter)
        bank[name] = adapter
        adapter.remove()
    bank.save(folder / "bank")
    bank.remove()
    assert len({*map(tuple, said.values())}) == 3
    return folder, said


def greedy(model):
    given = torch.tensor([[4, 5, 7]])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=1,
    )
    return [token for token in out[0, 3:].tolist() if token != WORDS.index("</s>")]


def options_of(folder, *arguments):
    return make_parser().parse_args(["serve", str(folder / "model"), "--port", "0", *arguments])


def ask(server, name):
    body = {"model": name, "prompt": [4, 5, 7], "max_tokens": 5, "temperature": 0}
    address = f"http://127.0.0.1:{server.server_port}/v1/completions"
    with urllib.request.urlopen(address, json.dumps(body).encode(), timeout=60) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def asked(folder, *arguments):
    """What the server says with each of its adapters, and without one."""
    server = _serve.make_server(options_of(folder, *arguments))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        names = {None: "base", **{name: f"base:{name}" for name in server.engine.adapters}}
        return {short: ask(server, name) for short, name in names.items()}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.engine.close()


def test_adapters_from_folders_of_their_own(saved):
    folder, said = saved
    given = [f"{name}={folder / name}" for name in ("ann", "bob")]
    assert asked(folder, "--adapter", *given) == said


def test_adapters_from_a_bank_and_beside_it(saved):
    folder, said = saved
    found = asked(folder, "--bank", str(folder / "bank"), "--adapter", f"eve={folder / 'ann'}")
    assert found == {**said, "eve": said["ann"]}


def test_places_of_folders(saved, tmp_path):
    folder, said = saved
    given = ["--bank", str(folder), "--adapter", f"eve={folder}"]
    inside = ["--subfolder", "bank", "--subfolder", "bob"]
    assert asked(folder, *given, *inside) == {**said, "eve": said["bob"]}


@pytest.mark.parametrize("how", ["shutdown", "interrupt", "terminate"])
def test_the_command_starts_and_stops(saved, how, monkeypatch, capsys):
    folder, said = saved
    forever, found = Server.serve_forever, []

    def serve(server):
        thread = threading.Thread(target=forever, args=(server,))
        thread.start()
        found.append(ask(server, "base:ann"))
        server.shutdown()
        thread.join()
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr(Server, "serve_forever", serve)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", str(folder / "model"), "--port=0", "--bank", str(folder / "bank")]) == 0
    assert found == [said["ann"]]
    assert signal.getsignal(signal.SIGTERM) is before
    text = capsys.readouterr().out
    assert "http://127.0.0.1:" in text
    assert ("stops after the answers" in text) == (how != "shutdown")


def test_a_forward_that_raises_ends_the_command(saved, monkeypatch, capsys):
    folder, _ = saved
    make, found = _serve.make_server, []

    def failing(options):
        server = make(options)
        server.engine.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        threading.Thread(target=lambda: found.append(status(server))).start()
        return server

    def status(server):
        with pytest.raises(urllib.error.HTTPError) as failed:
            ask(server, "base:ann")
        return failed.value.code, failed.value.read().decode()

    monkeypatch.setattr(_serve, "make_server", failing)
    assert main(["serve", str(folder / "model"), "--port=0", "--bank", str(folder / "bank")]) == 1
    assert "a forward failed" in capsys.readouterr().err
    until(lambda: found)
    assert found[0][0] == 500
    assert "division by zero" in found[0][1]


def test_a_second_interrupt_ends_the_process(saved, monkeypatch):
    folder, _ = saved
    close = Engine.close

    def interrupted(*_):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    monkeypatch.setattr(Engine, "close", lambda engine: close(engine) or interrupted())
    monkeypatch.setattr(_serve.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        main(["serve", str(folder / "model"), "--port=0", "--bank", str(folder / "bank")])
    assert left.value.code == 130


def test_what_cannot_be_served_is_refused_with_the_reason(saved, tmp_path, capsys):
    folder, _ = saved
    model, ann = str(folder / "model"), str(folder / "ann")
    encoder = tiny_roberta(tmp_path / "encoder")
    other = lortalib.nn.apply(AutoModelForCausalLM.from_pretrained(model), "tucker", 2)
    tucker = str(other.save(tmp_path / "tucker"))
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    one = ["--adapter", f"ann={ann}", "--port", "0"]
    for arguments, why in (
        ([model], "serve needs adapters: give --bank FOLDER"),
        ([model, *one, "--port", port], f"nothing can listen at 127.0.0.1, port {port}"),
        ([model, *one, "--host", "203.0.113.1"], "nothing can listen at 203.0.113.1"),
        ([model, *one, "--adapter", f"ann={ann}"], "two adapters are called 'ann'"),
        ([model, *one, "--adapter", f"bob={tucker}"], "; serve others at another port"),
        ([model, *one, "--bank", ann], "holds an adapter and no bank"),
        ([encoder, *one], "give a causal language model"),
        ([str(folder / "bank"), *one], "holds no config.json"),
        ([model, *one, "--add-from", str(tmp_path / "none")], "there is no folder"),
        ([model, *one, "--dtype", "float31"], "unknown dtype 'float31'"),
        ([model, *one, "--bank-dtype", "int8"], "unknown dtype 'int8'"),
        ([model, *one, "--subfolder", "a", "--subfolder", "b"], "found 2 for 1 folders"),
    ):
        assert main(["serve", *arguments]) == 1, arguments
        assert why in capsys.readouterr().err
    taken.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--adapter", "a=b", "model"], "found 'model'. MODEL goes first"),
        (["--adapter", "=my-adapter"], "as in ann=my-adapter"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--waiting", "0"], "at least 1"),
        (["--room", "many"], "an integer is needed"),
        (["--device", "gpu"], "a device of torch is needed"),
    ],
)
def test_words_that_the_parser_refuses(arguments, why, capsys):
    with pytest.raises(SystemExit) as left:
        main(["serve", "model", *arguments])
    assert left.value.code == 2
    assert why in capsys.readouterr().err
