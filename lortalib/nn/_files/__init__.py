"""Saves adapters and LoRAs to disk, and reads them back."""

from .adapter import load, read, read_adapter, read_description, save
from .export_lora import export_lora
from .folder import AdapterFileError
from .import_lora import load_lora
from .lora_config import lora_config
from .restore import restore

__all__ = [
    "AdapterFileError",
    "export_lora",
    "load",
    "load_lora",
    "lora_config",
    "read",
    "read_adapter",
    "read_description",
    "restore",
    "save",
]
