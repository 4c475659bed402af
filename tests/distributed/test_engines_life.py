"""An adapter that two processes trained under FSDP2 is switched, merged, written and read on as any other."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import peft
import pytest
import torch
from adapted import close, same_bits
from life_worker import base, logits

import lortalib

WORKER = Path(__file__).with_name("life_worker.py")
NARROW = "--dtype bfloat16"


def live(folder, arguments):
    """What two processes found."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(WORKER), str(folder), *arguments.split()],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Namespace(found=torch.load(folder / "found"), folder=folder, arguments=arguments)


def cases(*all_of_them, quick):
    """Only some run each time: every case starts two processes."""
    return [a if a in quick else pytest.param(a, marks=pytest.mark.slow) for a in all_of_them]


@pytest.fixture(
    scope="module",
    params=cases(
        "", "--head", "--head --reshard", "--share", "--format tucker", "--format uni_lora", NARROW,
        f"{NARROW} --head",
        quick=["--head", f"{NARROW} --head"],
    ),
)  # fmt: skip
def lived(request, tmp_path_factory):
    return live(tmp_path_factory.mktemp("life"), request.param)


def bare(lived):
    """The base as it was before any adapter. It computes in float32, also with numbers of bfloat16."""
    return base(torch.bfloat16 if NARROW in lived.arguments else torch.float32).float()


def tolerance(lived):
    """Relative to the largest logit; the adapter changes them by more than that logit."""
    return 8e-2 if NARROW in lived.arguments else 1e-5


def test_switching_it_off_gives_the_base_and_on_what_was_trained(lived):
    found = lived.found
    assert not close(found["trained"], found["start"], 1e-3)
    for state in ("set off", "merged, disabled"):
        assert same_bits(found[state], found["disabled"]), state
    assert close(found["disabled"], logits(bare(lived)), tolerance(lived))
    for state in ("enabled", "set on", "unmerged"):
        assert same_bits(found[state], found["trained"]), state


def test_merging_computes_the_same_and_unmerging_restores_every_bit(lived):
    found = lived.found
    assert close(found["merged"], found["trained"], tolerance(lived))
    both = found["merged beside another"]
    assert not close(both, found["merged"], 1e-1)
    assert close(found["unmerged beside the merged"], both, tolerance(lived))
    for state in ("merged again", "merged, the other out"):
        assert same_bits(found[state], found["merged"]), state
    known = bare(lived).state_dict()
    for name, weight in found["weights, disabled"].items():
        if "lortalib" not in name:
            assert torch.equal(weight.float(), known[name]), name


def test_what_was_saved_is_the_same_adapter_in_one_process(lived, tmp_path):
    model = bare(lived)
    adapter = lortalib.nn.load(model, lived.folder / "saved")
    found = lived.found
    assert close(logits(model), found["trained"], tolerance(lived))
    assert close(adapter.delta(adapter.sites[0]).detach(), found["delta"])
    assert close(adapter.norms(adapter.sites[0]), found["norms"])
    adapter.merge()
    assert close(logits(model), found["merged"], tolerance(lived))
    adapter.unmerge()
    if "--share" not in lived.arguments:
        adapter.export_lora(tmp_path)
        for own in ("adapter_config.json", "adapter_model.safetensors"):
            written = (lived.folder / "lora" / own).read_bytes()
            assert written == (tmp_path / own).read_bytes(), own


def test_one_process_alone_writes_the_same_file(lived):
    """From the state dict that Trainer gathers; to gather once more would wait for the others for ever."""
    alone = lived.folder / "by-one" / "default" / "adapter.safetensors"
    assert alone.read_bytes() == (lived.folder / "saved" / "adapter.safetensors").read_bytes()
    assert (lived.folder / "by-one" / "other" / "adapter.safetensors").exists()


def test_the_exported_lora_is_the_same_model(lived):
    if "--share" in lived.arguments:
        pytest.skip("the worker does not export it")
    model = peft.PeftModel.from_pretrained(bare(lived), lived.folder / "lora").eval()
    assert close(logits(model), lived.found["trained"], tolerance(lived))


def test_training_goes_on_and_the_update_can_be_left_in(lived):
    found = lived.found
    assert not close(found["trained on"], found["trained"], 1e-3)
    assert close(found["left in"], found["trained on"], tolerance(lived))
    model = bare(lived)
    assert found["weights, left in"].keys() == model.state_dict().keys()
    model.load_state_dict(found["weights, left in"])
    assert close(logits(model), found["left in"], tolerance(lived))


def test_a_saved_adapter_is_divided_and_trains_on(lived):
    if NARROW in lived.arguments:
        pytest.skip("the worker resumes in float32 only")
    found = lived.found
    assert close(found["resumed"], found["trained"])
    assert not close(found["resumed, trained"], found["trained"], 1e-3)


def test_an_adapter_that_comes_after_the_division_is_warned_of(lived):
    assert "put the adapter on before fully_shard" in lived.found["heard"]


@pytest.mark.parametrize("arguments", cases("--head", "", quick=["--head"]))
def test_peft_switches_and_merges_it_too(arguments, tmp_path):
    found = live(tmp_path, f"--door peft {arguments}").found
    assert close(found["disabled"], logits(base()))
    assert same_bits(found["enabled"], found["trained"])
    assert close(found["merged"], found["trained"])
    assert same_bits(found["unmerged"], found["trained"])
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert close(logits(model), found["trained"])
