"""Weights that are divided over processes: tensor parallelism is refused, with the reason."""

import peft
import pytest
import torch
import torch.distributed as dist
from adapted import unchanged
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lortalib
from lortalib.peft import LortaConfig


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensor_parallelism_is_refused(llama, mesh, tmp_path):
    saved = lortalib.nn.apply(llama, rank=2)
    folder = saved.save(tmp_path / "saved")
    saved.remove()
    projection = llama.model.layers[0].self_attn.q_proj
    divided = distribute_tensor(projection.weight.detach(), mesh, [Shard(0)])
    projection.weight = nn.Parameter(divided)
    with unchanged(llama), pytest.raises(ValueError, match="tensor parallelism"):
        lortalib.nn.apply(llama)
    with pytest.raises(ValueError, match="tensor parallelism"):
        peft.get_peft_model(llama, LortaConfig(target_modules=["q_proj"]))
    for call in (lortalib.nn.load, lambda *given: lortalib.nn.compress(*given, "cp", 2)):
        with pytest.raises(ValueError, match="tensor parallelism"):
            call(llama, folder)


def test_fsdp_is_not_taken_for_it(llama, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in llama.model.layers:
        fully_shard(layer)
    fully_shard(llama)
    assert hasattr(llama.model.layers[0].self_attn.q_proj.weight, "device_mesh")
    adapter = lortalib.nn.apply(llama)
    ids = torch.tensor([[5, 6, 7]])
    llama(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in adapter.parameters())
