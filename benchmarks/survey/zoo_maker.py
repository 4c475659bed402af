"""Makes inputs for one model from the signature of its forward and the fields of its config.

Where the layout of an input cannot be told from these (a spectrogram with the frames first or last,
images or videos), there are several, to be tried in turn.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

TOKENS, WIDTH = 8, 64


class Maker:
    """Makes the inputs of one model."""

    def __init__(self, model: nn.Module, model_type: str) -> None:
        self.model, self.model_type = model, model_type
        self.config: Any = getattr(model, "config", None)
        self.generator = torch.Generator().manual_seed(1)
        self.signature = inspect.signature(model.forward).parameters

    def variants(self, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The inputs in every layout of those that have several, the likeliest first.

        Args:
            given: those that are known: values, functions of the maker, None to leave one out.
        """
        base = self.names()
        if "grid_thw" in self.signature and "hidden_states" in base:
            given = {"hidden_states": Maker.patches, **given}
        base = {**{name: self.maker(name) for name in base if name not in given}, **given}
        options = {
            name: self.layouts(name) if name not in given and name in _LAYOUTS else [value]
            for name, value in base.items()
        }
        for towers in (True, False):
            for chosen in itertools.product(*options.values()):
                made = {
                    name: value(self) if callable(value) else value
                    for name, value in zip(options, chosen)
                }
                if towers and not self.complete(made):
                    continue
                if not towers:
                    self.text_alone(made)
                yield {name: value for name, value in made.items() if value is not None}
            if not self.multimodal(base):
                return

    def names(self) -> dict[str, None]:
        """Those that have no default, the main one, and those without which it makes no sense."""
        main = getattr(self.model, "main_input_name", "input_ids")
        main = main[0] if isinstance(main, list) else main
        needed = [
            name
            for name, parameter in self.signature.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        names = dict.fromkeys(needed)
        if main in self.signature:
            names[main] = None
        names |= {name: None for name in _USUAL if name in self.signature}
        for modality in _TOWERS:
            features = inspect.signature(self.features(modality) or self.features)
            names |= {
                name: None
                for name, parameter in features.parameters.items()
                if name in self.signature and parameter.default is parameter.empty
            }  # what `features` itself takes is the name of no input
        return names

    def maker(self, name: str) -> Callable[[Maker], Any] | None:
        """A function that makes the input of a name."""
        own = getattr(type(self), name, None)
        return own if own is not None else self.guess(name)

    # Models with towers

    def multimodal(self, made: dict[str, Any]) -> bool:
        """Whether a text goes with an image or a sound."""
        return "input_ids" in made and any(
            name in made for name in ("pixel_values", "input_features", "input_values")
        )

    def complete(self, made: dict[str, Any]) -> bool:
        """Put as many image and audio tokens among the text as the model makes features."""
        for modality, names in _TOWERS.items():
            main = next((name for name in names if made.get(name) is not None), None)
            if main is None or "input_ids" not in made:
                continue
            features = self.features(modality)
            token = self.find(*_TOKENS_OF[modality])
            if features is None or not isinstance(token, int):
                continue
            count = self.count(features, made)
            if count is None:
                return False
            ids = made["input_ids"]
            spread = torch.full((1, count), token)
            made["input_ids"] = torch.cat([ids[:, :2], spread, ids[:, 2:]], 1)
            if modality == "image" and "mm_token_type_ids" in self.signature:
                made["mm_token_type_ids"] = (made["input_ids"] == token).long()
            elif "token_type_ids" in made:
                made["token_type_ids"] = (made["input_ids"] == token).long()
        return True

    def features(self, modality: str) -> Callable[..., Any] | None:
        """The method that makes features of a modality, of the model or the first part with one."""
        name = f"get_{modality}_features"
        return next((getattr(m, name) for m in self.model.modules() if hasattr(m, name)), None)

    def count(self, features: Callable[..., Any], made: dict[str, Any]) -> int | None:
        """How many features the model makes of an image or a sound; None where it cannot."""
        accepted = inspect.signature(features).parameters
        options = {k: v for k, v in made.items() if k in accepted and k != "input_ids"}
        try:
            with torch.no_grad():
                found = features(**{k: v for k, v in options.items() if v is not None})
        except Exception:
            return None
        pooled = getattr(found, "pooler_output", None)
        found = getattr(found, "last_hidden_state", found) if pooled is None else pooled
        parts = list(found) if isinstance(found, (list, tuple)) else [found]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return sum(part.numel() // part.shape[-1] for part in tensors)

    def text_alone(self, made: dict[str, Any]) -> None:
        """Leave the towers out."""
        for name in list(made):
            needed = self.signature[name].default is inspect.Parameter.empty
            if not needed and name not in ("input_ids", "decoder_input_ids", "attention_mask"):
                made[name] = None

    # Sizes

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of these fields, in the config or breadth-first below it."""
        level = [self.config]
        while level:
            for owner in level:
                for name in names:
                    value = getattr(owner, "__dict__", {}).get(name)
                    if value is not None and not isinstance(value, PreTrainedConfig):
                        return value
            level = [
                below
                for owner in level
                for below in getattr(owner, "__dict__", {}).values()
                if isinstance(below, PreTrainedConfig)
            ]
        return default

    def number(self, *names: str, default: int) -> int:
        """The same, as one integer."""
        value = self.find(*names, default=default)
        value = value[0] if isinstance(value, (list, tuple)) else value
        return int(value) if isinstance(value, (int, float)) else default

    def rand(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        """Integers below ``high``."""
        return torch.randint(0, max(1, high), shape, generator=self.generator)

    def vision(self, *names: str, default: int) -> int:
        """A number of the vision tower's config, or of the whole."""
        owner = getattr(self.config, "vision_config", None) or self.config
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value:
                return value
        return default

    # By name

    def input_ids(self) -> Tensor:
        """Ordinary tokens."""
        vocab = self.number("vocab_size", "text_vocab_size", "src_vocab_size", default=32)
        low = min(10, vocab // 2)
        return low + self.ints(min(vocab, 90) - low, 1, TOKENS)

    decoder_input_ids = input_ids

    def bbox(self) -> Tensor:
        """A box for each token."""
        return torch.tensor([1, 2, 5, 7]).expand(1, TOKENS, 4).clone()

    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        found = self.find("image_size", "img_size", "input_size", "crop_size", default=64)
        sides = list(found) if isinstance(found, (list, tuple)) else [found, found]
        sides = [side if isinstance(side, int) else 64 for side in sides]
        channels = self.number("num_channels", "in_channels", "in_chans", default=3)
        return channels, sides[-2:][0], sides[-1]

    def pixel_values(self) -> Tensor:
        """One image, or one clip where the type is one for videos."""
        return self.clip() if self.for_videos() else self.rand(1, *self.image_shape())

    pixel_values_images = pixel_values

    def for_videos(self) -> bool:
        """Whether the type is one for videos."""
        main = getattr(self.model, "main_input_name", "")
        videos = re.search(r"video|vivit|timesformer|vjepa", self.model_type)
        return bool(videos) and main == "pixel_values"

    def clip(self) -> Tensor:
        """A short clip, one frame after the other."""
        frames = self.number("num_frames", "frames_per_clip", default=2)
        image = self.rand(1, 1, *self.image_shape())
        return image.expand(-1, frames, -1, -1, -1).clone()

    pixel_values_videos = clip

    def pair(self) -> Tensor:
        """Two images."""
        return self.rand(1, 2, *self.image_shape())

    def single(self) -> Tensor:
        """A batch of one list of one image."""
        return self.rand(1, 1, *self.image_shape())

    def images(self) -> Tensor:
        """One image for image and video types alike."""
        return self.rand(1, *self.image_shape())

    def tiles(self) -> Tensor:
        """A batch of one list of one image cut into tiles."""
        return self.rand(1, 1, self.vision("max_num_tiles", default=1), *self.image_shape())

    def patches(self) -> Tensor:
        """One image of 4 by 4 patches, flat."""
        return self.rand(16, self.patch_width())

    def patch_width(self) -> int:
        """How many numbers a patch holds."""
        patch = self.vision("patch_size", default=8)
        channels = self.vision("in_channels", "num_channels", "in_chans", default=3)
        time = self.vision("temporal_patch_size", default=1)
        return channels * time * patch * patch

    def batched_patches(self) -> Tensor:
        """The same with a batch axis."""
        return self.rand(1, 16, self.patch_width())

    def square_patches(self) -> Tensor:
        """The same, each patch an image."""
        patch = self.vision("patch_size", default=8)
        return self.rand(16, 3, patch, patch)

    def batched_square_patches(self) -> Tensor:
        """The same with a batch axis."""
        return self.square_patches().unsqueeze(0)

    def grid_thw(self) -> Tensor:
        """The grid of these patches: time, height, width."""
        return torch.tensor([[1, 4, 4]])

    image_grid_thw = grid_thw

    def merge_sizes(self) -> Tensor:
        """How many patches a side become one."""
        return torch.tensor([2])

    image_merge_sizes = merge_sizes

    def spatial_shapes(self) -> Tensor:
        """Height and width in patches."""
        return torch.tensor([[4, 4]])

    image_grid_hws = grid_hw = target_sizes = tgt_sizes = spatial_shapes

    def pixel_attention_mask(self) -> Tensor:
        """Every patch counts."""
        return torch.ones(1, 16, dtype=torch.long)

    def pixels_seen(self) -> Tensor:
        """Every pixel counts."""
        return torch.ones(1, 1, *self.image_shape()[1:], dtype=torch.long)

    def pixel_position_ids(self) -> Tensor:
        """Column and row of each patch."""
        return torch.cartesian_prod(torch.arange(4), torch.arange(4)).unsqueeze(0)

    image_position_ids = pixel_position_ids

    def image_sizes(self) -> Tensor:
        """Height and width in pixels."""
        return torch.tensor([self.image_shape()[1:]])

    def aspect_ratio_ids(self) -> Tensor:
        """The first aspect ratio: one tile."""
        return torch.ones(1, 1, dtype=torch.long)

    def aspect_ratio_mask(self) -> Tensor:
        """Every tile counts."""
        return torch.ones(1, 1, self.vision("max_num_tiles", default=1), dtype=torch.long)

    def flattened_patches(self) -> Tensor:
        """Patches with their row and column before them."""
        patch = self.vision("patch_embed_hidden_size", default=0)
        width = self.patch_width() if not self.find("patch_size") else 3 * self.vision(
            "patch_size", default=16) ** 2  # fmt: skip
        place = 1 + torch.cartesian_prod(torch.arange(4), torch.arange(4)).unsqueeze(0)
        return torch.cat([place.float(), self.rand(1, 16, patch or width)], 2)

    def mels(self) -> int:
        """Height of a spectrogram."""
        return self.number(
            "feature_projection_input_dim", "num_mel_bins", "feature_size", "n_mel_bins",
            "input_feat_size", "input_dim", "mel_bins", "n_mels", "n_features", "num_mels",
            "input_size", default=80)  # fmt: skip

    def input_values(self) -> Tensor:
        """A waveform."""
        channels = self.number("audio_channels", default=0)
        return self.rand(1, channels, 2000) if channels else self.rand(1, 2000)

    def mono(self) -> Tensor:
        """A waveform with an axis for its one channel."""
        return self.rand(1, 1, 3200)

    def input_features(self) -> Tensor:
        """A spectrogram, as long as there are positions."""
        frames = self.number("max_source_positions", default=0)
        if frames and "subsampl" not in str(vars(self.config).keys()):
            return self.rand(1, self.mels(), 2 * frames)
        return self.frames_first()

    def frames_first(self) -> Tensor:
        """A spectrogram, frames first."""
        return self.rand(1, 64, self.mels())

    def mels_first(self) -> Tensor:
        """A spectrogram, frames last."""
        return self.rand(1, self.mels(), 64)

    def channel_first(self) -> Tensor:
        """A spectrogram as an image."""
        return self.rand(1, 1, 64, self.mels())

    def long_mels(self) -> Tensor:
        """A spectrogram as long as an even number of windows."""
        return self.rand(1, self.mels(), 4 * self.number("n_window", default=50))

    def input_features_mask(self) -> Tensor:
        """Every frame counts."""
        frames = max(64, 2 * self.number("max_source_positions", default=0))
        return torch.ones(1, frames, dtype=torch.long)

    def feature_attention_mask(self) -> Tensor:
        """The same under another name."""
        return torch.ones(1, 64, dtype=torch.long)

    def attention_mask(self) -> Tensor:
        """Everything is seen."""
        return torch.ones(1, TOKENS, dtype=torch.long)

    def past_values(self) -> Tensor:
        """A series."""
        return self.rand(1, 64)

    def past_values_padding(self) -> Tensor:
        """Nothing is padded."""
        return torch.zeros(1, 64, dtype=torch.long)

    inputs = input_ids

    def width(self, *names: str) -> int:
        """Width of the hidden states."""
        return self.number(*names, "hidden_size", "d_model", "embed_dim", default=WIDTH)

    def states(self) -> Tensor:
        """Hidden states."""
        return self.rand(1, TOKENS, self.width())

    def layouts(self, name: str) -> list[Callable[[Maker], Any] | None]:
        """The makers that are tried in turn for a name."""
        grid = any(other in self.signature for other in ("image_grid_thw", "grid_thw"))
        flat = grid or any(
            other in self.signature for other in ("spatial_shapes", "pixel_position_ids")
        )
        found: list[Callable[[Maker], Any] | None] = list(_LAYOUTS[name])
        if name == "pixel_values" and flat:
            found = [Maker.patches, Maker.batched_patches, Maker.square_patches, *found]
        main = self.maker(name)
        return [main, *(maker for maker in found if maker is not main)] if not flat else found

    def guess(self, name: str) -> Callable[[Maker], Any] | None:
        """A maker for a name that has none: by the kind of thing that it says."""
        if name.endswith("_ids"):
            return Maker.input_ids
        if re.search(r"hidden_state|embeds|features|states|context", name):
            return Maker.states
        if "mask" in name:
            return Maker.attention_mask
        if "pixel_values" in name:
            return Maker.pixel_values
        return None


#: Inputs that are given wherever a forward takes them.
_USUAL = (
    "input_ids", "pixel_values", "decoder_input_ids", "bbox", "image_grid_thw", "spatial_shapes",
    "pixel_position_ids", "image_position_ids", "image_sizes", "aspect_ratio_ids",
    "aspect_ratio_mask", "input_features", "input_features_mask", "flattened_patches",
    "target_sizes", "image_grid_hws", "feature_attention_mask",
)  # fmt: skip
_LAYOUTS: dict[str, list[Callable[[Maker], Any] | None]] = {
    "pixel_values": [
        Maker.images, Maker.single, Maker.pair, Maker.clip, Maker.patches,
        Maker.batched_patches, Maker.square_patches, Maker.batched_square_patches, Maker.tiles,
    ],
    "input_features": [
        Maker.mels_first, Maker.frames_first, Maker.channel_first, Maker.long_mels,
    ],
    "image_sizes": [None],
    "pixel_attention_mask": [Maker.pixels_seen],
    "input_features_mask": [Maker.input_features_mask, None],
    "input_values": [Maker.input_values, Maker.mono, Maker.input_ids, Maker.frames_first],
}  # fmt: skip
_TOWERS = {
    "image": ("pixel_values",),
    "audio": ("input_features", "input_values"),
}
_TOKENS_OF = {
    "image": ("image_token_id", "image_token_index", "media_token_id"),
    "audio": ("audio_token_id", "audio_token_index"),
}
