"""Lets a Trainer of transformers resume from checkpoints that contain adapters without their base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._adapters import adapters
from ._files import restore
from ._save_pretrained import by_a_trainer_that_reads_adapters, saved_in

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class AdapterTrainerMixin(_Trainer):
    """Mixin for a Trainer, or any subclass of it: ``class MyTrainer(AdapterTrainerMixin, Trainer): pass``.

    Checkpoints of a model with adapters of `lortalib.nn.apply` contain the adapters and the optimiser, but no
    base; this mixin reads them for ``resume_from_checkpoint`` and ``load_best_model_at_end``. It warns if an
    adapter cannot train because it is merged or not active, and of the first loss that is not finite.

    Example:
        >>> import lortalib, tempfile, torch
        >>> from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
        >>> model = BertForMaskedLM(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        ...                                    intermediate_size=64, vocab_size=50))
        >>> adapter = lortalib.nn.apply(model, "cp", rank=2)
        >>> class MyTrainer(lortalib.nn.AdapterTrainerMixin, Trainer): pass
        >>> row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
        >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=2, save_steps=1, report_to=[],
        ...                               use_cpu=True, disable_tqdm=True, logging_steps=5)
        >>> trainer = MyTrainer(model=model, args=arguments, train_dataset=[row] * 16)
        >>> trainer.train(resume_from_checkpoint=False).global_step # doctest: +ELLIPSIS
        {...}
        2
    """

    _warned_of_loss = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """Take one training step, as ``Trainer.training_step`` does, with the warnings of this class.

        Args:
            model, inputs, args, options: as for ``Trainer.training_step``.
        """
        found = adapters(model)
        for name, adapter in found.items():
            if adapter.merged:
                warnings.warn(
                    f"adapter {name!r} is merged: the forward is the base's own, so the adapter does not "
                    "train; call unmerge() first",
                    stacklevel=2,
                )
        if found and not any(adapter.active for adapter in found.values()):
            warnings.warn(
                f"no adapter of the model is active ({', '.join(map(repr, found))}), so none trains; call "
                "enable() first",
                stacklevel=2,
            )
        loss: Tensor = super().training_step(model, inputs, *args, **options)
        if not self._warned_of_loss and not bool(torch.isfinite(loss).all()):
            self._warned_of_loss = True
            warnings.warn(
                f"the loss of step {self.state.global_step + 1} is {loss.mean().item()}; what is saved from "
                "here on may be refused as not finite. Use a lower learning rate or clipped gradients",
                stacklevel=2,
            )
        return loss

    def _save(self, *args: Any, **options: Any) -> None:
        with by_a_trainer_that_reads_adapters():
            super()._save(*args, **options)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self._restore(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif _holds_a_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._restore(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._restore(best, None):
            super()._load_best_model()
        elif _holds_a_model(best):
            super()._load_best_model()
            self._restore(best, None)

    def _restore(self, folder: str, model: nn.Module | None) -> bool:
        """Restore the adapters from a checkpoint; return False if the checkpoint contains none of them."""
        found: Any = self.model if model is None else model
        unmerged = [adapter for adapter in adapters(found).values() if not adapter.merged]
        places = saved_in(Path(folder), unmerged)
        if not any((place / "adapter.safetensors").exists() for place in places.values()):
            return False
        for adapter in unmerged:
            restore(adapter, places[adapter.name])
        return True


def _holds_a_model(folder: str) -> bool:
    return Path(folder, "config.json").exists()
