"""Plots adapters and networks with matplotlib (``pip install "lortalib[plots]"``).

Every function draws into the axes that it is given, or into a new figure, and returns the axes; nothing is
shown or saved. `lortalib.decomp.draw` draws a network itself and needs no matplotlib.
"""

from ._adapters import heads, layers
from ._networks import congruence, ranks, singular_values

__all__ = ["congruence", "heads", "layers", "ranks", "singular_values"]
