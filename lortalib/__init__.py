"""lortalib: fine-tune a transformer through one low-rank tensor.

`lortalib.decomp` makes tensor networks; `lortalib.nn` puts them on a model.
"""

from . import decomp
from ._version import __version__
from ._with_peft import register_when_imported

register_when_imported()

__all__ = ["__version__", "decomp"]
