"""Tells transformers, which would put an adapter into a plain model, that PEFT's model has to hold it."""

from __future__ import annotations


class SharedState:
    """Stands for True where PEFT asks whether modules share state; being asked is being refused.

    PEFT asks only in ``inject_adapter_in_model``, on behalf of ``from_pretrained``, ``pipeline``,
    ``load_adapter`` and ``add_adapter`` of transformers.
    """

    def __bool__(self) -> bool:
        """Refuse.

        Raises:
            ValueError: always, with what to call instead.
        """
        raise ValueError(
            "a LORTA adapter has one tensor for all modules, which transformers cannot put into a plain "
            "model (from_pretrained, pipeline, load_adapter, add_adapter). Read the model of the adapter, "
            "then call lortalib.nn.load(model, folder) or peft.PeftModel.from_pretrained(model, folder), and "
            "give that model to pipeline. For use without lortalib: `lortalib merge MODEL FOLDER OUT` "
            "writes an ordinary model, `lortalib export-lora FOLDER OUT` an ordinary LoRA"
        )
