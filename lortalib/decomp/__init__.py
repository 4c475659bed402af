"""Tensor decompositions as networks of named legs, over PyTorch and TensorLy."""

from ._along import along
from ._formats import Format, cp, format_of, network, register, registry, tt, tucker
from ._legs import Legs, LegsError
from ._modes import MODES, T_MODES, Shape
from ._network import Cut, Network, TensorNetwork
from ._sum import direct_sum
from ._tensorly import Fit, decompose, from_tensorly, to_tensorly

__all__ = [
    "MODES",
    "T_MODES",
    "Cut",
    "Fit",
    "Format",
    "Legs",
    "LegsError",
    "Network",
    "Shape",
    "TensorNetwork",
    "along",
    "cp",
    "decompose",
    "direct_sum",
    "format_of",
    "from_tensorly",
    "network",
    "register",
    "registry",
    "to_tensorly",
    "tt",
    "tucker",
]
