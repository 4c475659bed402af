"""Compresses saved LoRAs and adapters of one model into one tensor."""

from .compression import Compression
from .errors import SiteError
from .make import compress

__all__ = ["Compression", "SiteError", "compress"]
