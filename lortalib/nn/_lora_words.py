"""Explains the arguments of PEFT's LoraConfig by the names that they have in lortalib."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Arguments of PEFT's LoraConfig that no door has, each with an explanation for the error message.
LORA_WORDS = {
    "r": "the size of the bonds is called rank",
    "lora_alpha": "the factor is called alpha, and is not divided by the rank: leave it out, or give "
    "alpha=lora_alpha / r for the scaling of that LoRA",
    "lora_dropout": "it is called dropout",
    "use_rslora": "nothing is divided by the rank, so there is nothing to correct; leave it out",
    "use_dora": "DoRA trains a magnitude for each feature of each module, which one tensor for all modules "
    "does not have; leave it out",
}
#: The same, with further arguments that only `lortalib.nn` lacks.
_WORDS_OF_NN = LORA_WORDS | {
    "target_modules": "the modules are called targets",
    "exclude_modules": "targets takes a function of a site, such as lambda site: site.layer > 0",
    "layers_to_transform": "they are called layers",
    "modules_to_save": "modules that train as a whole are called train_also",
    "init_lora_weights": "the start is called init",
    "bias": "biases stay as they are; whole modules train with train_also",
    "task_type": "the model says what it is for; leave it out",
    "rank_pattern": "one tensor has one rank for all modules; give rank a mapping from bonds to sizes",
    "alpha_pattern": "one tensor has one scaling for all modules; use two adapters",
}


def explains_lora_words(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse arguments of PEFT's LoraConfig with a message that explains them.

    Args:
        function: a function of `lortalib.nn` that makes adapters.
    """

    @wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in kwargs.keys() & _WORDS_OF_NN.keys():
            raise TypeError(f"{function.__name__}() has no {word}=: {_WORDS_OF_NN[word]}")
        return function(*args, **kwargs)

    return explained
