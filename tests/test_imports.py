"""What an import of the library loads: little more than torch (benchmarks/speed/imports.py measures it)."""

import subprocess
import sys

import pytest

#: Modules that take long to import, and that nobody needs who only imports the library.
HEAVY = {
    "accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "peft", "scipy", "sympy", "tensorly",
    "torch._dynamo", "torch._inductor", "tqdm", "transformers",
}  # fmt: skip


def loaded(code):
    """The modules that a fresh process has loaded after some code."""
    told = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def torch_alone():
    return loaded("import torch")


@pytest.mark.parametrize(
    ("name", "place"),
    [("apply", "nn"), ("cp", "decomp"), ("LortaConfig", "peft"), ("Server", "serve")],
)
def test_a_name_of_a_module_is_found(name, place):
    import lortalib
    import lortalib.peft
    import lortalib.serve

    with pytest.raises(AttributeError, match=rf"use lortalib\.{place}\.{name}$"):
        getattr(lortalib, name)
    with pytest.raises(AttributeError, match=rf"did you mean lortalib\.{place}\.{name}\?$"):
        getattr(lortalib, name + name[-1])
    with pytest.raises(AttributeError, match=r"did you mean lortalib\.decomp\?$"):
        _ = lortalib.decom
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = lortalib.nothing


def test_lortalib_alone_loads_nothing():
    assert not loaded("import lortalib") & {"torch", "numpy", *HEAVY}


@pytest.mark.parametrize(
    "code",
    [
        "import lortalib; lortalib.decomp.cp((2, 2, 2, 4, 4), 2).cut('layer', 'matrix')",
        "import lortalib; lortalib.nn.apply, lortalib.nn.load, lortalib.nn.AdapterTrainerMixin",
        "from lortalib.nn import door",
    ],
)
def test_a_door_loads_torch_and_little_else(code, torch_alone):
    assert not (loaded(code) - torch_alone) & HEAVY
