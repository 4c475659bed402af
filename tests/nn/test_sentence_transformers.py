"""sentence-transformers: trained by its own trainer, saved, loaded, merged, encoding all the way."""

import numpy as np
import pytest
from assets import minilm

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
