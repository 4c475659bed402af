"""Saves adapters and LoRAs to disk, and reads them back."""

from .adapter import load, read, read_adapter, read_description, save, write_adapter
from .convert import convert
from .export_lora import export_lora
from .fit import Rules
from .folder import AdapterFileError
from .gguf_lora import export_gguf
from .import_lora import Lora, load_lora
from .lora_config import lora_config
from .lora_file import LowRank
from .lora_sites import lora_network, lora_sites, residual_pair
from .pairs_of_folder import read_pairs
from .peft_folder import describe_for_peft
from .restore import restore

__all__ = [
    "AdapterFileError",
    "Lora",
    "LowRank",
    "Rules",
    "convert",
    "describe_for_peft",
    "export_gguf",
    "export_lora",
    "load",
    "load_lora",
    "lora_config",
    "lora_network",
    "lora_sites",
    "read",
    "read_adapter",
    "read_description",
    "read_pairs",
    "residual_pair",
    "restore",
    "save",
    "write_adapter",
]
