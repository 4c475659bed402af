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


def test_the_layout_of_timm(monkeypatch):
    torch.manual_seed(0)
    model = VisionTransformer().eval()
    with pytest.raises(lortalib.nn.UnsupportedModelError, match="whose layout cannot be read off"):
        lortalib.nn.sites(model)  # another class Attention could have any
    monkeypatch.setattr(Attention, "__module__", "timm.layers.attention")
    found = lortalib.nn.sites(model)
    assert [site.role for site in found] == ["q", "k", "v", "o"] * 2
    assert lortalib.nn.verify(model, X).complete
    adapter = put(model, targets="all")
    adapted = output(model, X)
    adapter.merge()
    assert close(output(model, X), adapted)


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


@pytest.mark.parametrize("kind", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
def test_models_of_timm_in_transformers(kind):
    timm()
    import transformers

    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"img_size": 32, **TINY}, num_labels=3
    )
    check(getattr(transformers, kind)(config).eval(), {"pixel_values": X["x"]})
