"""Saves adapters and LoRAs to disk, and reads them back."""

from .adapter import save
from .compare import Difference, compare_updates
from .convert import convert
from .export_lora import export_lora
from .fit import Rules
from .folder import BANK, FILES, AdapterFileError, adapter_file
from .gguf_lora import export_gguf
from .import_lora import Lora, load_lora
from .load import load, read, read_adapter, read_description
from .lora_config import lora_config
from .lora_file import LowRank
from .lora_sites import lora_network, lora_sites, residual_pair
from .pairs_of_folder import read_pairs
from .peft_folder import describe_for_peft
from .restore import restore
from .tensors import digest, open_tensors, plain, write_tensors

__all__ = [
    "BANK",
    "FILES",
    "AdapterFileError",
    "Difference",
    "Lora",
    "LowRank",
    "Rules",
    "adapter_file",
    "compare_updates",
    "convert",
    "describe_for_peft",
    "digest",
    "export_gguf",
    "export_lora",
    "load",
    "load_lora",
    "lora_config",
    "lora_network",
    "lora_sites",
    "open_tensors",
    "plain",
    "read",
    "read_adapter",
    "read_description",
    "read_pairs",
    "residual_pair",
    "restore",
    "save",
    "write_tensors",
]
