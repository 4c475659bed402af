"""Adapters on transformers models: one low-rank tensor for all attention projections."""

from ._adapter import Adapter
from ._adapters import adapters, set_active
from ._align import align_to_gradient
from ._anatomy import (
    BlockRule,
    FeatureRows,
    NoAttentionError,
    Site,
    UnsupportedModelError,
    mlp_sites,
    sites,
)
from ._apply import apply
from ._bank import Bank, bank, bank_like
from ._change_rank import change_rank
from ._compress import Compression, SiteError, compress
from ._config import AdapterConfig
from ._files import (
    AdapterFileError,
    convert,
    export_gguf,
    export_lora,
    load,
    load_lora,
    read,
    read_description,
)
from ._group import Group
from ._parameter_groups import parameter_groups
from ._plan import Plan
from ._plan_model import plan
from ._rank_schedule import RankSchedule
from ._tasks import TaskAdapter
from ._trainer import AdapterTrainerMixin
from ._verify import Report, check_effect, verify

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFileError",
    "AdapterTrainerMixin",
    "Bank",
    "BlockRule",
    "Compression",
    "FeatureRows",
    "Group",
    "NoAttentionError",
    "Plan",
    "RankSchedule",
    "Report",
    "Site",
    "SiteError",
    "TaskAdapter",
    "UnsupportedModelError",
    "adapters",
    "align_to_gradient",
    "apply",
    "bank",
    "bank_like",
    "change_rank",
    "check_effect",
    "compress",
    "convert",
    "export_gguf",
    "export_lora",
    "load",
    "load_lora",
    "mlp_sites",
    "parameter_groups",
    "plan",
    "read",
    "read_description",
    "set_active",
    "sites",
    "verify",
]
