"""Finds the files of an adapter in a folder, and replaces them in one step."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

#: The name of an adapter's file.
TENSORS = "adapter.safetensors"
#: The name of the second file of a bank.
BANK = "bank.safetensors"
#: The name of the second file, which format version 1 had.
DESCRIPTION = "adapter.json"
#: The two files of PEFT.
TENSORS_OF_PEFT = "adapter_model.safetensors"
CONFIG_OF_PEFT = "adapter_config.json"
#: The file by which the folder of a model is known.
CONFIG_OF_MODEL = "config.json"
#: What PEFT calls the method of lortalib.
METHOD = "LORTA"
#: The files of an adapter, of either kind, and that by which the folder of a bank is known.
FILES = (TENSORS, DESCRIPTION, TENSORS_OF_PEFT, CONFIG_OF_PEFT, BANK)
#: The largest size of a text that describes an adapter, in bytes.
LONGEST_TEXT = 16 * 2**20

_ASIDE = ".saving-"
_SECONDS_UNTIL_LEFT = 3600


class AdapterFileError(ValueError):
    """Raised for a folder with a damaged adapter, or with one that does not fit the model."""


def adapter_file(folder: str | os.PathLike[str]) -> Path:
    """Find the path of the adapter's file.

    Args:
        folder: a folder that `Adapter.save` or ``save_pretrained`` of PEFT wrote, or the path of its file.

    Raises:
        FileNotFoundError: there is no such file; the message says what the folder contains.
        AdapterFileError: there are two, of which one may be an older one.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    file = folder / TENSORS
    if file.is_file():
        if (folder / TENSORS_OF_PEFT).is_file() and is_of_peft(folder):
            raise AdapterFileError(
                f"{folder} holds two adapters, {TENSORS} of Adapter.save and {TENSORS_OF_PEFT} of PEFT; give "
                "the path of the file that is meant, or save each to a folder of its own"
            )
        return file
    if (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"no {TENSORS} in {folder}, beside its {DESCRIPTION}")
    if (folder / CONFIG_OF_PEFT).is_file():
        if (folder / TENSORS_OF_PEFT).is_file():
            return folder / TENSORS_OF_PEFT
        raise FileNotFoundError(
            f"no {TENSORS_OF_PEFT} in {folder}, beside its {CONFIG_OF_PEFT}; its adapter may be open to "
            "peft.PeftModel.from_pretrained, or a LoRA with lortalib.nn.load_lora"
        )
    raise FileNotFoundError(
        f"no {TENSORS} in {folder}; a saved adapter is a folder with {TENSORS}, as Adapter.save "
        f"writes it, or with {CONFIG_OF_PEFT} and {TENSORS_OF_PEFT}, as PEFT does"
        + _instead(folder)
    )


def is_of_peft(folder: Path) -> bool:
    """Return True if the configuration of PEFT in a folder is of lortalib's method, and not of a LoRA.

    Args:
        folder: any folder; False if it has no such file.
    """
    try:
        config = read_json(folder / CONFIG_OF_PEFT)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == METHOD


def is_lora(folder: Path) -> bool:
    """Return True for a folder of PEFT that holds another method than lortalib's, which only a LoRA may be.

    Args:
        folder: any folder.

    Raises:
        AdapterFileError: the configuration is damaged.
    """
    if not (folder / CONFIG_OF_PEFT).is_file() or (folder / TENSORS).is_file():
        return False
    config = read_json(folder / CONFIG_OF_PEFT)
    return not (isinstance(config, dict) and config.get("peft_type") == METHOD)


def refuse_bank(folder: str | os.PathLike[str]) -> None:
    """Refuse the folder of a bank where that of an adapter is read or written.

    Args:
        folder: the folder, or the path of a file in it.

    Raises:
        AdapterFileError: the folder has the file of a bank.
    """
    path = Path(folder)
    if ((path.parent if path.is_file() else path) / BANK).is_file():
        raise AdapterFileError(
            f"{folder} is the folder of a bank, not of an adapter: it has a {BANK}. Read it with "
            "bank.load; bank.adapter(name).save writes one adapter to a folder of its own"
        )


def _instead(folder: Path) -> str:
    """Say what is there instead of an adapter: nothing, a model, or folders that hold adapters, as those of
    models with several do."""
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _names_beside(folder), n=1)
        hint = f"; did you mean {folder.with_name(near[0])}?" if near else ""
        return f". There is no such folder{hint}"
    if (folder / CONFIG_OF_MODEL).is_file():
        return f". It holds a model: it has a {CONFIG_OF_MODEL}"
    found = {
        file.parent.name for name in (TENSORS, TENSORS_OF_PEFT) for file in folder.glob(f"*/{name}")
    }
    return f". There are adapters in its {', '.join(sorted(found))}" if found else ""


def _names_beside(path: Path) -> list[str]:
    try:
        return [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return []


def read_json(file: Path) -> Any:
    """Read a JSON file as `parse_json` does.

    Raises:
        AdapterFileError: the file cannot be read, is too long, not UTF-8, or not strict JSON.
    """
    try:
        with file.open("rb") as opened:
            return parse_json(opened.read(LONGEST_TEXT + 1).decode())
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error


def parse_json(text: str, longest: int = LONGEST_TEXT) -> Any:
    """Parse a JSON text, more strictly than Python's own reader.

    Args:
        text: the text.
        longest: the largest number of bytes.

    Raises:
        ValueError: a text that is too long, nested too deep or not JSON; a repeated key, NaN or
            infinity, or half of a surrogate pair.

    Example:
        >>> parse_json('{"a": [1, 2.5]}')
        {'a': [1, 2.5]}
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
            ...
        ValueError: the key 'a' stands twice
    """
    if len(text) > longest or len(text.encode()) > longest:
        raise ValueError(f"it has more than {longest:,} bytes of description")
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be printed
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} stands twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def put_files(folder: Path, files: Mapping[str, Callable[[BinaryIO], None]]) -> None:
    """Write files under temporary names, then rename them into a folder.

    A rename replaces a file in one step, so another reader, or this process after being killed, finds
    either the old or the new file. With several files, an error between the renames puts the old ones
    back.

    Args:
        folder: the folder; it is made if it does not exist.
        files: the function that writes each file, by file name; renamed in this order.

    Raises:
        OSError: the folder cannot be written. Files that were there stay unchanged.
    """
    _check_place(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(folder)
    aside = folder / f"{_ASIDE}{uuid4().hex}"
    try:
        aside.mkdir()
        for name, write in files.items():
            with (aside / name).open("xb") as opened:
                write(opened)
                opened.flush()
                os.fsync(
                    opened.fileno()
                )  # otherwise a crash could leave an empty file under the new name
        _swap(aside, folder, list(files))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder)


def _check_place(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder that a file stands in the way of, and names of files that folders have.

    Raises:
        NotADirectoryError, IsADirectoryError: what stands there.
    """
    for each in (folder, *folder.parents):
        if each.exists() and not each.is_dir():
            raise NotADirectoryError(f"a folder is needed; {each} is a file. Give another path")
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(
                f"a file is needed; {folder / name} is a folder. Give another path"
            )


def write_text(file: BinaryIO, text: str) -> None:
    """Write a text as UTF-8."""
    file.write(text.encode())


def _swap(aside: Path, folder: Path, names: Iterable[str]) -> None:
    """Rename new files into place; if there are several, any error puts the old ones back."""
    names = list(names)
    if len(names) == 1:
        os.replace(aside / names[0], folder / names[0])
        return
    for name in names:
        if (folder / name).exists():
            _keep(folder / name, aside / f"old-{name}")
    try:
        for name in names:
            os.replace(aside / name, folder / name)
    except BaseException:
        for name in names:
            if (aside / f"old-{name}").exists():
                os.replace(aside / f"old-{name}", folder / name)
            elif not (aside / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise


def _keep(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:  # this file system has no hard links
        shutil.copy2(file, copy)


def _sync(folder: Path) -> None:
    """Flush the rename to disk, if the system can open folders (Windows cannot)."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _remove_left_overs(folder: Path) -> None:
    """Remove temporary files of killed saves, once they are too old to belong to a running save."""
    for path in folder.glob(f"{_ASIDE}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _SECONDS_UNTIL_LEFT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_old_description(folder: Path) -> None:
    """Remove the ``adapter.json`` of format version 1 after a file of a later version replaced it."""
    file = folder / DESCRIPTION
    with suppress(OSError, AdapterFileError):
        found = read_json(file) if file.is_file() else None
        if isinstance(found, dict) and found.get("format") == "lortalib adapter":
            file.unlink()
