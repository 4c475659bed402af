"""Vision transformers of timm: their fused projections, by hand where timm is not installed."""

import importlib

import pytest
import torch
from adapted import close, output, put
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import lortalib

X = {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}
#: Models of timm, with what makes them tiny.
MODELS = {
    "vit_tiny_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "vit_small_patch16_dinov3": TINY,
    "vit_base_patch16_siglip_224": TINY,
    "vit_relpos_small_patch16_224": TINY,
    "samvit_base_patch16": {**TINY, "global_attn_indexes": (1,)},
    "beit_base_patch16_224": TINY,
    "eva02_base_patch14_224": {**TINY, "patch_size": 16},
    "swin_tiny_patch4_window7_224": {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)},
    "swinv2_tiny_window8_256": {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)},
}
#: Models of timm with no option that makes them tiny, and the size of their pictures.
LARGER = {
    "caformer_s18": 64, "crossvit_tiny_240": 240, "fastvit_sa24": 64, "maxvit_rmlp_pico_rw_256": 256,
    "maxxvit_rmlp_nano_rw_256": 256, "mvitv2_tiny": 224, "nextvit_small": 64, "pvt_v2_b0": 64,
    "swinv2_cr_tiny_224": 224, "tiny_vit_5m_224": 224, "twins_pcpvt_small": 64,
    "twins_svt_small": 64, "volo_d1_224": 224,
}  # fmt: skip
#: Classes of timm with the layout of `Attention` below, by their modules.
CLASSES = [
    "timm.layers.attention.Attention", "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.fastvit.Attention", "timm.models.metaformer.Attention", "timm.models.volo.Attention",
    "timm.models.hiera.MaskUnitAttention", "timm.models.hieradet_sam2.MultiScaleAttention",
    "timm.models.mvitv2.MultiScaleAttention", "timm.models.davit.WindowAttention",
    "timm.models.twins.LocallyGroupedAttn", "timm.models.swin_transformer.WindowAttention",
]  # fmt: skip


class Attention(nn.Module):
    """What timm.layers.attention.Attention computes."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(
            scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width)
        )


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """The names and the computation of timm's model of this name."""

    def __init__(self, width=32, heads=4, depth=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        tokens = self.patch_embed(x).flatten(2).mT
        return (self.head(self.blocks(tokens).mean(1)),)


def check(model, inputs):
    """Plan, verify, run and merge an adapter on attention and MLPs."""
    for (
        parameter
    ) in model.parameters():  # some begin with scales of zero, behind which nothing has an effect
        nn.init.normal_(parameter, std=0.2)
    lortalib.nn.verify(model, inputs).raise_for_disagreement()
    base = model(**inputs)
    adapter = put(model, targets="all", verify_with=inputs)
    assert {"q", "k", "v", "o", "up", "down"} <= {site.role for site in adapter.sites}
    adapted = model(**inputs)
    adapter.merge()
    merged = model(**inputs)
    for one, two, three in zip(*(as_tuple(each) for each in (base, adapted, merged))):
        assert not close(one, two)
        assert close(two, three)


def as_tuple(found):
    return (found,) if isinstance(found, torch.Tensor) else tuple(found.values())


def as_class_of(name, base=Attention):
    """A class that computes what ``base`` does, under the name of one of timm."""
    module, _, own = name.rpartition(".")
    return type(own, (base,), {"__module__": module})


def transformer(kind):
    """A transformer of blocks of this class."""
    torch.manual_seed(0)
    model = VisionTransformer().eval()
    for block in model.blocks:
        block.attn.__class__ = kind
    return model


@pytest.mark.parametrize("name", CLASSES)
def test_the_layout_of_timm(name):
    with pytest.raises(lortalib.nn.UnsupportedModelError, match="whose layout cannot be read off"):
        lortalib.nn.sites(transformer(Attention))  # another class Attention could have any
    model = transformer(as_class_of(name))
    found = lortalib.nn.sites(model)
    assert [site.role for site in found] == ["q", "k", "v", "o"] * 2
    assert lortalib.nn.verify(model, X).complete
    adapter = put(model, targets="all")
    adapted = output(model, X)
    adapter.merge()
    assert close(output(model, X), adapted)


class PerHead(Attention):
    """What timm's AttentionCl computes with ``head_first``."""

    head_first = True

    def forward(self, x):
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=3)
        return self.proj(
            scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width)
        )


@pytest.mark.parametrize("kind", [Attention, PerHead])
def test_a_layout_that_depends_on_the_block(kind):
    model = transformer(as_class_of("timm.models.maxxvit.AttentionCl", kind))
    for block in model.blocks:
        block.attn.head_first = kind is PerHead
    assert lortalib.nn.verify(model, X).complete


class Cross(nn.Module):
    """What timm's CrossAttention computes: the first token reads all."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.wq, self.wk, self.wv = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            f(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for f, y in ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x))
        )
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_projections_of_other_names():
    model = transformer(Attention)
    for block in model.blocks:
        block.attn = Cross(32, 4)
        block.attn.__class__ = as_class_of("timm.models.crossvit.CrossAttention", Cross)
    assert [site.role for site in lortalib.nn.sites(model)] == ["q", "k", "v", "o"] * 2
    assert lortalib.nn.verify(model, X).complete


def test_heads_whose_components_lie_apart_are_refused():
    model = transformer(as_class_of("timm.models.nest.Attention"))
    with pytest.raises(lortalib.nn.UnsupportedModelError, match="components of all heads in turn"):
        lortalib.nn.sites(model)


@pytest.mark.parametrize(
    "name", ["timm.models.davit.ChannelAttention", "timm.layers.split_attn.SplitAttn"]
)
def test_what_attends_over_no_tokens_is_left_out(name):
    with pytest.raises(lortalib.nn.NoAttentionError, match="no attention was found"):
        lortalib.nn.sites(transformer(as_class_of(name)))


def timm():
    """timm, which needs torchvision."""
    try:
        return importlib.import_module("timm")
    except Exception as error:  # torchvision of another build of torch raises what it likes
        pytest.skip(f"timm cannot be imported: {error}")


@pytest.mark.parametrize("name", MODELS)
def test_models_of_timm(name):
    torch.manual_seed(0)
    size = 64 if name.startswith("swin") else 32
    model = timm().create_model(name, pretrained=False, img_size=size, **MODELS[name]).eval()
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    check(model, {"x": x})


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_models_of_timm(name):
    torch.manual_seed(0)
    size = LARGER[name]
    model = timm().create_model(name, pretrained=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert lortalib.nn.verify(model, {"x": x}).complete


@pytest.mark.parametrize("kind", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
def test_models_of_timm_in_transformers(kind):
    timm()
    import transformers

    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"img_size": 32, **TINY}, num_labels=3
    )
    check(getattr(transformers, kind)(config).eval(), {"pixel_values": X["x"]})
