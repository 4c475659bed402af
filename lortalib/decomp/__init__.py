"""Represents tensor decompositions as networks of parameters whose axes (legs) have names.

The networks are PyTorch modules. TensorLy is imported when a function that needs it is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._absorb import absorb
from ._balance import balance
from ._budget import budget
from ._canonical import canonical
from ._cross import Cross, cross
from ._cut import Cut, CutPlan
from ._diagnose import (
    component_norms,
    conditioning,
    congruence,
    core_consistency,
    multilinear_ranks,
    singular_values,
)
from ._draw import Drawing, draw
from ._environment import environment, gram
from ._formats import (
    Format,
    block_term,
    cara,
    cp_matrix,
    fact_tk,
    folded_cp,
    formats,
    get_format,
    indscal,
    jd,
    jd_diag,
    lora,
    lora_xs,
    loretta,
    lotr,
    metatt_4d,
    metatt_41d,
    register_format,
    rescal,
    ring,
    tt_lora,
    uni_lora,
    vera,
)
from ._grow import grow
from ._hosvd import start_along
from ._inner import distance, inner, norm
from ._legs import Legs
from ._make import cp, network, tt, tucker
from ._modes import LORTA_MODES, MODES, Shape, ShapeLike
from ._network import Network
from ._notation import LegsError, Term
from ._product import hadamard, scale
from ._prune import prune
from ._rank_change import BondMap, RankChange
from ._rank_table import RankRow, RankTable
from ._ranks import Rank
from ._shared import mark_shared
from ._start import Start, StartLike, get_start
from ._sum import direct_sum
from ._tensor_network import NetworkView, TensorNetwork
from ._three_way import ThreeWayCut, ThreeWayPlan, three_way_plan

if TYPE_CHECKING:
    from ._convert import Conversion, convert
    from ._fit import Fit, fit
    from ._round import Rounding, round
    from ._suggest import suggest_rank
    from ._tensorly import from_tensorly, to_tensorly

__all__ = [
    "LORTA_MODES",
    "MODES",
    "BondMap",
    "Conversion",
    "Cross",
    "Cut",
    "CutPlan",
    "Drawing",
    "Fit",
    "Format",
    "Legs",
    "LegsError",
    "Network",
    "NetworkView",
    "Rank",
    "RankChange",
    "RankRow",
    "RankTable",
    "Rounding",
    "Shape",
    "ShapeLike",
    "Start",
    "StartLike",
    "TensorNetwork",
    "Term",
    "ThreeWayCut",
    "ThreeWayPlan",
    "absorb",
    "balance",
    "block_term",
    "budget",
    "canonical",
    "cara",
    "component_norms",
    "conditioning",
    "congruence",
    "convert",
    "core_consistency",
    "cp",
    "cp_matrix",
    "cross",
    "direct_sum",
    "distance",
    "draw",
    "environment",
    "fact_tk",
    "fit",
    "folded_cp",
    "formats",
    "from_tensorly",
    "get_format",
    "get_start",
    "gram",
    "grow",
    "hadamard",
    "indscal",
    "inner",
    "jd",
    "jd_diag",
    "lora",
    "lora_xs",
    "loretta",
    "lotr",
    "mark_shared",
    "metatt_4d",
    "metatt_41d",
    "multilinear_ranks",
    "network",
    "norm",
    "prune",
    "register_format",
    "rescal",
    "ring",
    "round",
    "scale",
    "singular_values",
    "start_along",
    "suggest_rank",
    "three_way_plan",
    "to_tensorly",
    "tt",
    "tt_lora",
    "tucker",
    "uni_lora",
    "vera",
]


#: Names whose files load TensorLy.
_WITH_TENSORLY = {
    "Conversion": "._convert",
    "Fit": "._fit",
    "Rounding": "._round",
    "convert": "._convert",
    "fit": "._fit",
    "from_tensorly": "._tensorly",
    "round": "._round",
    "suggest_rank": "._suggest",
    "to_tensorly": "._tensorly",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TENSORLY:
        return getattr(importlib.import_module(_WITH_TENSORLY[name], __name__), name)
    # With the name and the object, Python adds "Did you mean".
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
