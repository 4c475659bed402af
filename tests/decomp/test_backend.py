"""The user's TensorLy backend is the same after any call as before it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorly as tl
import torch
from reference import on
from strategies import build

from lortalib.decomp import fit, from_tensorly, get_format, tucker
from lortalib.decomp._tensorly import with_pytorch

SHAPE = (3, 2, 2, 5, 4)


@pytest.fixture(params=["numpy", "pytorch"])
def default(request):
    """TensorLy's setting for the process, put back at the end."""
    before = tl.get_backend()
    tl.set_backend(request.param)
    yield request.param
    tl.set_backend(before)


def seen_by_a_new_thread():
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(tl.get_backend).result()


def succeed():
    for kind in ("cp", "tucker", "tt"):
        net = build(kind, SHAPE, 2)
        assert from_tensorly(net.to_tensorly()).dense().equal(net.dense())
        assert fit(net.dense(), kind, 2).error < 1e-4


def fail():
    with pytest.raises(ValueError, match="at least two factors"):
        tucker({"in": 3}, 1).to_tensorly()  # inside TensorLy
    with pytest.raises(ValueError, match="NaN"):
        fit(torch.full(SHAPE, torch.nan), "tt", 2)
    with pytest.raises(ValueError, match="only CP"):
        get_format("ring")(SHAPE, 2).to_tensorly()


@pytest.mark.parametrize("use", [succeed, fail])
def test_the_setting_of_the_process_is_as_it_was(default, use):
    use()
    assert tl.get_backend() == default == seen_by_a_new_thread()
    assert isinstance(tl.tensor([1.0]), np.ndarray if default == "numpy" else torch.Tensor)


@pytest.mark.parametrize("use", [succeed, fail])
@pytest.mark.parametrize("local", ["numpy", "pytorch"])
def test_the_setting_of_a_thread_is_as_it_was(default, local, use):
    assert on(local, lambda: (use(), tl.get_backend())[1]) == local
    assert tl.get_backend() == default == seen_by_a_new_thread()


def test_several_threads_at_once(default):
    locals_ = ["numpy", "pytorch", None, "numpy", "pytorch", None]
    barrier = threading.Barrier(len(locals_))

    def run(local):
        if local is not None:
            tl.set_backend(local, local_threadsafe=True)
        barrier.wait(60)
        seen = set()
        for use in (succeed, fail, succeed):
            use()
            seen.add(tl.get_backend())
        return seen

    with ThreadPoolExecutor(len(locals_)) as threads:
        found = list(threads.map(run, locals_))
    assert found == [{local or default} for local in locals_]
    assert tl.get_backend() == default == seen_by_a_new_thread()


def test_a_thread_is_made_only_where_a_setting_would_change(default):
    is_here = with_pytorch(threading.get_ident) == threading.get_ident()
    assert is_here == (default == "pytorch")
