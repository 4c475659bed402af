"""The benchmark behind `make gpu` runs everywhere, keeps to its time and never loses what it has."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def options(folder, **changes):
    given = {"device": "cpu", "size": "small", "minutes": 1.0, "only": "", "out": folder}
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture
def bench(tmp_path):
    """A function that makes a run; its alarm is off afterwards."""
    import run

    yield lambda **changes: run.Run(options(tmp_path, **changes))
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def of(results, **wanted):
    return [r for r in results if wanted.items() <= r.items()]


@pytest.mark.slow
@pytest.mark.parametrize("only", ["eager", ""])
def test_the_benchmark_runs_everywhere(only, tmp_path):
    command = [
        sys.executable, "benchmarks/gpu/run.py", "--device", DEVICE, "--size", "small",
        "--minutes", "5", "--no-tests", "--only", only, "--out", tmp_path,
    ]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (file,) = tmp_path.glob("results-*.json")
    results = json.loads(file.read_text())["results"]
    assert [r for r in results if "failed" in r] == []
    missing = [r for r in results if "not run" in r]
    graphs = of(results, mode="CUDA graph") if DEVICE == "cpu" else []
    assert missing == graphs
    timed = {(r["work"], r["mode"]) for r in results if "ms" in r}
    assert {("training step", "eager"), ("decoding", "eager")} <= timed
    assert ("training step", "compiled") in timed or only
    text = file.with_suffix(".md").read_text()
    assert "tiny, training step, eager, 2 x 16" in text
    assert "bank at least 10 times" in text


def test_decoding_begins_behind_the_prompt_after_every_rewind():
    import cases

    model = cases.llama("tiny", torch.device("cpu"), torch.float32)
    work = cases.decoding(model, torch.randint(256, (2, 16)))
    first = work.run()
    for _ in range(3):
        work.rewind()
        found = [work.run() for _ in range(cases.ROOM)]
        assert torch.equal(found[0], first)
    with pytest.raises(IndexError):  # on a GPU this ends the whole process
        work.run()


def test_a_merged_contender_leaves_the_base_as_it_is():
    import cases

    base = cases.llama("tiny", torch.device("cpu"), torch.float32)
    before = [p.clone() for p in base.parameters()]
    merged = cases.CONTENDERS[cases.MERGED](base)
    assert all(map(torch.equal, before, base.parameters()))
    assert not all(map(torch.equal, before, merged.parameters()))


@pytest.mark.slow
def test_a_cell_or_contender_that_fails_costs_nothing_else(bench, monkeypatch):
    import cases
    import plan

    def broken(base):
        raise ValueError("no such kernel")

    monkeypatch.setitem(cases.CONTENDERS, "lortalib LoTR r8", broken)
    names = [cases.FLOOR, "lortalib LoTR r8", cases.LORA]
    monkeypatch.setattr(plan.Cell, "contenders", lambda cell: names)
    one = bench()
    one.measure(plan.Cell("tiny", "prefill", "eager", 2, 16))
    monkeypatch.setitem(cases.CONTENDERS, cases.FLOOR, broken)
    one.measure(plan.Cell("tiny", "prefill", "eager", 2, 16))
    with_failure, without_floor = one.results
    assert with_failure["failed"] == {"lortalib LoTR r8": "ValueError: no such kernel"}
    assert cases.LORA in with_failure["ms"]
    assert without_floor["not run"] == "ValueError: no such kernel"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs an alarm")
def test_what_does_not_fit_into_the_time_is_left_out(bench, monkeypatch, tmp_path):
    import cases
    import plan

    def endless(base):
        time.sleep(600)

    one = bench(minutes=9)
    monkeypatch.setitem(cases.CONTENDERS, cases.LORA, endless)
    cell = plan.Cell("tiny", "prefill", "eager", 2, 16)
    one.model("tiny")
    one.end = time.monotonic() + 5
    signal.setitimer(signal.ITIMER_REAL, 5, 1)
    begin = time.monotonic()
    one.measure(cell)
    one.measure(cell)
    assert time.monotonic() - begin < 300
    said = [result["not run"] for result in one.results]
    assert said == ["the time was up before it was done", "no time was left"]
    text = (tmp_path / "results-cpu.md").read_text()
    assert "* tiny, prefill, eager, 2 x 16: no time was left" in text
