"""Adapters on the denoising models of diffusers, from the plan to the saved model."""

from dataclasses import replace

import pytest
import torch
from adapted import close, output, picture, put, same_bits, unchanged
from safetensors.torch import load_file

import lortalib
from lortalib import nn

diffusers = pytest.importorskip("diffusers")

JOINT = {
    "patch_size": 2, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 4,
    "joint_attention_dim": 16, "pooled_projection_dim": 16,
}  # fmt: skip


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **JOINT, sample_size=8, num_layers=2, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {
        "hidden_states": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 16),
        "pooled_projections": draw(1, 16), "timestep": torch.tensor([3.0]),
    }  # fmt: skip
    return model, inputs


def flux():
    model = diffusers.FluxTransformer2DModel(
        **{**JOINT, "patch_size": 1}, num_layers=2, num_single_layers=2, axes_dims_rope=[2, 2, 4]
    )
    inputs = {
        "hidden_states": draw(1, 16, 4), "encoder_hidden_states": draw(1, 5, 16),
        "pooled_projections": draw(1, 16), "timestep": torch.tensor([0.3]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, inputs


def unet():
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = {
        "sample": draw(1, 4, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": draw(1, 5, 16),
    }  # fmt: skip
    return model, inputs


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        norm_num_groups=2, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    inputs = {
        "hidden_states": draw(1, 4, 8, 8), "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }  # fmt: skip
    return model, inputs


CASES = {"SD3": sd3, "Flux": flux, "UNet": unet, "DiT": dit}
each_model = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def made(make):
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))  # some start at zero
    return model.eval(), inputs


@each_model
def test_the_probe_confirms_every_stack(make):
    model, inputs = made(make)
    report = nn.verify(model, inputs)
    assert report.complete, str(report)
    assert {stack.stack for stack in report.stacks} == {site.stack for site in nn.sites(model)}


def test_every_projection_of_joint_attention_is_found():
    for make, layers, last in ((sd3, 2, 1), (flux, 2, 2)):
        model, _ = made(make)
        roles = [
            (s.role, s.path.rpartition(".")[2]) for s in nn.sites(model) if s.stack.endswith(".add")
        ]
        assert roles.count(("q", "add_q_proj")) == layers
        assert roles.count(("o", "to_add_out")) == last  # SD3's last block does not write the words


def test_the_output_of_a_single_block_is_the_part_that_reads_the_heads():
    model, _ = made(flux)
    out = [s for s in nn.sites(model) if s.stack == "single_transformer_blocks" and s.role == "o"]
    assert [site.path for site in out] == [
        f"single_transformer_blocks.{k}.proj_out" for k in (0, 1)
    ]
    assert [(site.features, site.fused) for site in out] == [(32, 160)] * 2
    assert out[0].weight_shape == model.single_transformer_blocks[0].proj_out.weight.shape


def wrong(sites, stack, one, other):
    """The plan with two roles of one stack exchanged."""
    swap = {one: other, other: one}
    return [replace(s, role=swap.get(s.role, s.role)) if s.stack == stack else s for s in sites]


@pytest.mark.parametrize(("one", "other"), [("q", "k"), ("k", "v")])
@pytest.mark.parametrize("stack", ["transformer_blocks", "transformer_blocks.add"])
def test_the_probe_refutes_a_wrong_plan_of_joint_attention(stack, one, other):
    model, inputs = made(sd3)
    report = nn.verify(model, inputs, sites=wrong(nn.sites(model), stack, one, other))
    assert not report.complete


def test_the_probe_refutes_heads_of_another_size_in_the_second_set():
    model, inputs = made(flux)
    halves = [
        replace(s, heads=8, query_heads=8, head_dim=4) if s.stack.endswith(".add") else s
        for s in nn.sites(model)
    ]
    assert not nn.verify(model, inputs, sites=halves).ok


def test_the_probe_refutes_another_place_of_the_heads_in_a_single_block():
    model, inputs = made(flux)
    moved = [
        replace(s, rows=replace(s.rows, offset=64)) if s.rows is not None else s
        for s in nn.sites(model)
    ]
    assert not nn.verify(model, inputs, sites=moved).ok


@each_model
@pytest.mark.parametrize("line", ["cp", "indscal"])
def test_the_life_of_an_adapter(make, line, tmp_path):
    model, inputs = made(make)
    before, base = picture(model), output(model, inputs)
    adapter = put(model, line, alpha=0.1)
    adapted = output(model, inputs)
    assert not close(adapted, base, 1e-3)
    model(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    model.zero_grad()
    dense(model, adapter, inputs, adapted)
    adapter.merge()
    assert close(output(model, inputs), adapted)
    adapter.unmerge()
    adapter.save(tmp_path / "saved")
    adapter.export_lora(tmp_path / "lora")
    adapter.remove()
    assert same_bits(output(model, inputs), base)
    assert sorted(before) == sorted(picture(model))
    again = nn.load(model, tmp_path / "saved")
    assert same_bits(output(model, inputs), adapted)
    again.remove()
    nn.load_lora(model, tmp_path / "lora")
    assert close(output(model, inputs), adapted)


def dense(model, adapter, inputs, adapted):
    """The output with each site's dense update added to its weight by hand."""
    twin, _ = made(next(make for make in CASES.values() if type(made(make)[0]) is type(model)))
    with torch.no_grad():
        for site in adapter.sites:
            twin.get_submodule(site.path).weight += adapter.delta(site)
    assert close(output(twin, inputs), adapted)


@each_model
def test_every_bit_of_the_base_comes_back(make):
    model, inputs = made(make)
    adapter = put(model)
    adapter.disable()
    base = output(model, inputs)
    adapter.merge()
    adapter.unmerge()
    adapter.disable()
    assert same_bits(output(model, inputs), base)


@each_model
@pytest.mark.parametrize("shared", [(), ("in", "out")])
def test_a_bank_adds_what_its_adapter_adds(make, shared):
    """Flux's single blocks write the heads and the MLP by one matrix: their heads are a part of its input."""
    model, inputs = made(make)
    base = output(model, inputs)
    adapter = put(model, alpha=0.1, shared=shared)
    adapted = output(model, inputs)
    assert not close(adapted, base)
    adapter.disable()
    bank = nn.bank(model, "cp", 2, shared=shared, alpha=0.1)
    bank["a"] = adapter
    with bank.using(["a"]):
        assert close(output(model, inputs), adapted)
    with bank.using([None]):
        assert close(output(model, inputs), base)


def test_the_second_argument_of_diffusers_is_no_state_dict(tmp_path):
    model, _ = made(sd3)
    adapter = put(model)
    model.save_pretrained(tmp_path, True, torch.save)
    read = nn.read(tmp_path)
    for name, network in adapter.networks.items():
        assert all(map(torch.equal, network.parameters(), read.networks[name].parameters()))


def test_a_model_is_saved_as_one_of_diffusers(tmp_path):
    model, inputs = made(sd3)
    adapter = put(model, alpha=0.1)
    adapted = output(model, inputs)
    with unchanged(model):
        model.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter.safetensors", "README.md"}
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "from diffusers import SD3Transformer2DModel" in text
    adapter.merge()
    children = list(model.named_children())
    model.save_pretrained(tmp_path / "merged")  # diffusers notes its version in the configuration
    assert list(model.named_children()) == children
    names = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert not any("lortalib" in name for name in names)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert close(output(again, inputs), adapted)


def test_a_tiny_pipeline_denoises_with_the_adapter(tmp_path):
    model, _ = made(dit)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=2, sample_size=16,
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def picture_of():
        generator = torch.Generator().manual_seed(0)
        found = pipe([1], generator=generator, num_inference_steps=2, output_type="np").images
        return torch.from_numpy(found)

    base = picture_of()
    adapter = lortalib.nn.apply(pipe.transformer, "cp", 2, init="normal", alpha=0.1)
    assert not close(picture_of(), base, 1e-4)
    with adapter.disabled():
        assert same_bits(picture_of(), base)
