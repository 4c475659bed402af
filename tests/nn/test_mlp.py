"""MLPs and packed experts as targets, and fused, latent and bypassed attention, from start to end."""

import copy

import pytest
import torch
import transformers

from lortalib import nn

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "bert": transformers.BertConfig(**SMALL),
    "gpt2": transformers.GPT2Config(**GPT),
    "phi3": transformers.Phi3Config(**SMALL, num_key_value_heads=2),
    "modernbert": transformers.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2),
    "mixtral": transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, head_dim=8
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": transformers.DeepseekV3Config(**LATENT),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99),
    "falcon": transformers.FalconConfig(**SMALL),
    "new_falcon": transformers.FalconConfig(
        **SMALL, new_decoder_architecture=True, num_kv_heads=2
    ),
    "codegen": transformers.CodeGenConfig(**{**GPT, "n_head": 8}, rotary_dim=4),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT),
    "siglip": transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    ),
    "wavlm": transformers.WavLMConfig(
        **SMALL, conv_dim=(16, 16), conv_kernel=(4, 4), conv_stride=(4, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    ),
}  # fmt: skip
CASES = [(name, "qkvo") for name in MODELS] + [
    (name, targets)
    for name in ("llama", "bert", "gpt2", "phi3", "modernbert", "mixtral", "gpt_oss", "deepseek_v3")
    for targets in ("mlp", "all")
]


def build(name):
    """A tiny random model in eval mode, and a function that computes its output.

    The function runs without gradients, and the model is frozen from the start: where something
    requires gradients torch may take other kernels, and equal bits are asked for between runs of like
    kind only. ``output.graded`` runs with gradients.
    """
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(copy.deepcopy(MODELS[name])).eval()
    model.requires_grad_(False)
    if name == "siglip":
        pixels = torch.randn(2, 3, 32, 32)
        return model, without_gradients(lambda m: m(pixel_values=pixels).pooler_output)
    if name == "wavlm":
        wave = torch.randn(2, 400)
        return model, without_gradients(lambda m: m(input_values=wave).last_hidden_state)
    ids = torch.randint(3, 99, (2, 7))
    return model, without_gradients(lambda m: m(input_ids=ids).last_hidden_state)


def without_gradients(run):
    output = torch.no_grad()(run)
    output.graded = run
    return output


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_from_start_to_end(name, targets, tmp_path):
    model, output = build(name)
    base, names = output(model), list(model.state_dict())
    fresh = nn.apply(model, "cp", 2, targets=targets)
    assert torch.equal(output(model), base)
    fresh.remove()

    adapter = nn.apply(
        model, "cp", 2, targets=targets, init="normal", share_residual=targets == "all"
    )
    adapted = output(model)
    assert (adapted - base).abs().max() > 1e-3
    output.graded(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert torch.equal(output(copy.deepcopy(model)), adapted)
    with adapter.disabled():
        assert torch.equal(output(model), base)

    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=1e-3, atol=2e-4)
    adapter.unmerge()
    assert torch.equal(output(model), adapted)

    adapter.save(tmp_path)
    count = adapter.count()
    adapter.remove()
    assert list(model.state_dict()) == names
    assert torch.equal(output(model), base)

    again = nn.load(model, tmp_path)
    assert torch.equal(output(model), adapted)
    assert again.count() == count
    assert sum(p.numel() for p in again.parameters()) == count


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_supported_implementation_of_experts_sees_the_update(name, implementation):
    model, output = build(name)
    model.set_experts_implementation(implementation)
    adapter = nn.apply(model, "cp", 2, targets="mlp", init="normal")
    adapted = output(model)
    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=1e-3, atol=1e-4)


def test_other_implementations_of_experts_are_refused_and_nothing_is_changed():
    model, _ = build("mixtral")
    model.config._experts_implementation = "sonicmoe"
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="experts implementation 'sonicmoe'"):
        nn.apply(model, "cp", 2, targets="mlp")
    assert list(model.state_dict()) == names
    assert not nn.adapters(model)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_of_the_tensor_is_that_expert_of_the_weight(name):
    model, _ = build(name)
    adapter = nn.apply(model, "cp", 2, targets="mlp", init="normal")
    (network,) = adapter.networks.values()
    for site in adapter.sites:
        before = adapter.delta(site)
        assert before.shape == model.get_submodule(site.path)._parameters[site.parameter].shape
        with torch.no_grad():
            network.expert_r[2] += 1
        moved = (adapter.delta(site) - before).flatten(1).abs().sum(1)
        assert moved.nonzero().flatten().tolist() == [2]


def test_gate_and_up_have_rows_of_their_own():
    model, _ = build("gpt_oss")
    rows = {site.role: site.rows for site in nn.mlp_sites(model)[:3]}
    assert rows["gate"].index().tolist()[:3] == [0, 2, 4]
    assert rows["up"].index().tolist()[:3] == [1, 3, 5]
    assert rows["down"] is None


def test_sharing_the_residual_factor_saves_its_numbers():
    model, _ = build("llama")
    apart = nn.apply(model, "cp", 4, targets="all", name="apart")
    shared = nn.apply(model, "cp", 4, targets="all", share_residual=True, name="shared")
    assert apart.count() - shared.count() == 4 * 32
    first, second = shared.networks.values()
    assert first.in_r is second.in_r


def test_two_adapters_on_a_bypassed_weight_add_up_and_leave_one_by_one():
    model, output = build("siglip")
    base, names = output(model), list(model.state_dict())
    first = nn.apply(model, "cp", 2, init="normal", name="first")
    one = output(model)
    second = nn.apply(model, "tt", 2, init="normal", name="second")
    both = output(model)
    assert not torch.equal(one, both)
    first.remove()
    nn.set_active(model, [])
    assert torch.equal(output(model), base)
    second.remove()
    assert list(model.state_dict()) == names
    assert torch.equal(output(model), base)


def test_a_model_without_mlp_says_so():
    with pytest.raises(nn.UnsupportedModelError, match="no MLP was found"):
        nn.mlp_sites(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_formats_that_do_not_name_the_mode_expert_are_refused_for_experts():
    model, _ = build("mixtral")
    with pytest.raises(ValueError, match="'expert'"):
        nn.apply(model, "lotr", 2, targets="mlp")
    assert not nn.adapters(model)


def test_modules_that_hold_one_weight_are_one_site():
    model, output = build("llama")
    first, second = (layer.self_attn for layer in model.layers)
    second.q_proj.weight = first.q_proj.weight
    found = nn.sites(model)
    assert len(found) == 7
    assert found[0].tied_paths == ("layers.1.self_attn.q_proj",)
    base = output(model)
    adapter = nn.apply(model, "cp", 2, init="normal")
    adapted = output(model)
    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    adapter.remove()
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_router_is_adapted_when_it_is_named(name):
    model, output = build(name)
    assert "router" in {site.role for site in nn.mlp_sites(model)}
    assert "router" not in {site.role for site in nn.apply(model, "cp", 2, targets="mlp").sites}
    nn.adapters(model)["default"].remove()
    adapter = nn.apply(model, "cp", 2, targets=["router"], init="normal")
    assert {site.role for site in adapter.sites} == {"router"}
    adapted = output(model)
    with adapter.disabled():
        assert not torch.equal(output(model), adapted)
    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=1e-3, atol=1e-4)
