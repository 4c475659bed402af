"""Compresses saved LoRAs and adapters of one model into one tensor."""

from .compress import compress
from .compression import Compression
from .errors import SiteError

__all__ = ["Compression", "SiteError", "compress"]
