"""Refuses calls by which transformers would put an adapter into a plain model instead of PEFT's model."""

from __future__ import annotations


class SharedState:
    """Stands for True where PEFT asks whether modules share state, and raises an error when asked.

    PEFT asks only in ``inject_adapter_in_model``, which ``from_pretrained``, ``pipeline``, ``load_adapter``
    and ``add_adapter`` of transformers call.
    """

    def __bool__(self) -> bool:
        """Refuse to put the adapter into a plain model.

        Raises:
            ValueError: always; the message says which calls to use instead.
        """
        raise ValueError(
            "a LORTA adapter has one tensor for all modules, which transformers cannot put into a plain "
            "model (from_pretrained, pipeline, load_adapter, add_adapter). Read the model of the adapter, "
            "then call lortalib.nn.load(model, folder) or peft.PeftModel.from_pretrained(model, folder), and "
            "give that model to pipeline. For use without lortalib: `lortalib merge MODEL FOLDER OUT` "
            "writes an ordinary model, `lortalib export-lora FOLDER OUT` an ordinary LoRA"
        )
