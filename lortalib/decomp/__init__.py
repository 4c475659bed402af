"""Tensor decompositions as networks of named legs, over PyTorch and TensorLy."""

from ._along import start_along
from ._formats import Format, cp, formats, get_format, network, register_format, tt, tucker
from ._legs import Legs, LegsError
from ._modes import LORTA_MODES, MODES, Shape
from ._network import Cut, Network, TensorNetwork
from ._sum import direct_sum
from ._tensorly import Fit, decompose, from_tensorly, to_tensorly

__all__ = [
    "LORTA_MODES",
    "MODES",
    "Cut",
    "Fit",
    "Format",
    "Legs",
    "LegsError",
    "Network",
    "Shape",
    "TensorNetwork",
    "cp",
    "decompose",
    "direct_sum",
    "formats",
    "from_tensorly",
    "get_format",
    "network",
    "register_format",
    "start_along",
    "to_tensorly",
    "tt",
    "tucker",
]
