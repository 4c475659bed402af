"""sentence-transformers: trained by its own trainer, saved, loaded, merged, encoding all the way."""

import numpy as np
import pytest
import torch
from adapted import put
from assets import minilm
from banks import random_stack
from models import FAMILIES

import lortalib

pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
TEXTS = ["a cat", "a dog", "red"]


def model():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm()), device="cpu").eval()


def trainer(model, out):
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class AdapterTrainer(lortalib.nn.AdapterTrainerMixin, SentenceTransformerTrainer):
        pass

    pairs = {"anchor": ["a cat", "a dog", "red", "blue"] * 4,
             "positive": ["the cat", "the dog", "red paint", "blue paint"] * 4}  # fmt: skip
    arguments = SentenceTransformerTrainingArguments(
        str(out), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )


def untrained():
    """A tiny model that encodes without files."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    class Words(torch.nn.Module):
        """Numbers the letters of each text, and runs a BERT on them."""

        def __init__(self):
            super().__init__()
            self.auto_model = FAMILIES["Bert"].model("Model")

        def preprocess(self, texts, *args, **options):
            rows = [torch.tensor([ord(letter) - 94 for letter in text]) for text in texts]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

        tokenize = preprocess

        def forward(self, features, **options):
            found = self.auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"]
            )
            return {**features, "token_embeddings": found[0]}

    return SentenceTransformer(modules=[Words(), Pooling(16)], device="cpu").eval()


@pytest.mark.parametrize("door", ["bank", "tasks"])
def test_names_of_rows_never_go_to_other_texts(door):
    texts = ["ab", "abcd", "a"]  # encode() begins with the longest
    model = untrained()
    if door == "tasks":
        owner = put(model, "cp", tasks=["one", "two"])
    else:
        owner = lortalib.nn.bank(model, "cp", 2)
        owner.fill(["one", "two"], random_stack(owner, 2))
    alone = {}
    for name in ("one", "two"):
        with owner.using([name]):
            alone[name] = model.encode(texts)
    assert np.abs(alone["one"] - alone["two"]).max() > 1e-3
    with owner.using(["one", "two", "one"]), torch.no_grad():
        rows = model(model.tokenize(texts))["sentence_embedding"].numpy()
        np.testing.assert_allclose(rows[0], alone["one"][0], atol=1e-5)
        np.testing.assert_allclose(rows[1], alone["two"][1], atol=1e-5)
        with pytest.raises(ValueError, match="sort texts by length, so names of rows"):
            model.encode(texts)


def test_from_the_trainer_to_a_merged_model(tmp_path):
    try:
        trained = model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    adapter = lortalib.nn.apply(trained, rank=4)
    before = trained.encode(TEXTS)
    trainer(trained, tmp_path / "run").train()
    trained.eval()
    after = trained.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3

    loaded = model()
    lortalib.nn.load(loaded, adapter.save(tmp_path / "adapter"))
    np.testing.assert_array_equal(loaded.encode(TEXTS), after)

    resumed = model()
    lortalib.nn.apply(resumed, rank=4)
    trainer(resumed, tmp_path / "run").train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-2")
    )
    resumed.eval()
    np.testing.assert_allclose(resumed.encode(TEXTS), after, atol=1e-5)

    adapter.merge()
    trained.save_pretrained(str(tmp_path / "merged"))
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), after, atol=1e-5)
