"""Adapters and LoRAs on disk."""

from .adapter import load, read_adapter, save
from .export_lora import export_lora
from .folder import AdapterFileError
from .import_lora import load_lora

__all__ = ["AdapterFileError", "export_lora", "load", "load_lora", "read_adapter", "save"]
