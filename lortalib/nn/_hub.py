"""Finds the folder of a repository of the Hugging Face hub, and uploads a folder to a repository.

huggingface_hub, which takes a quarter of a second to import, is imported when it is first asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TypedDict

from .._kinds import PATH, TEXT, TOKEN, Kind, are, takes


def is_repository(name: object) -> bool:
    """Return True if a text has the form of a repository's name, ``user/name``; nothing is looked up.

    Args:
        name: anything; only a text can name a repository, a `Path` is always a path.

    Example:
        >>> [is_repository(name) for name in ("user/name", "name", "./name", "a/b/c", "a/b.safetensors")]
        [True, False, False, False, False]
    """
    if not isinstance(name, str) or name.count("/") != 1 or name.endswith(".safetensors"):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@takes(folder=PATH, revision=TEXT.or_none, token=TOKEN.or_none, subfolder=TEXT.or_none)
def local_folder(
    folder: str | PathLike[str],
    files: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the folder of a name: the local path, or the downloaded files of a repository.

    A local path goes before the hub, where ``subfolder`` is a folder in it likewise. The hub is asked only
    for a name of the form ``user/name`` that is no local path, and only for the files that are named. They
    are kept in the cache of huggingface_hub.

    Args:
        folder: a path, or the name of a repository.
        files: the names of the files to download; no others are.
        revision: a branch, tag or commit of the repository; by default ``main``.
        token: a token of the hub; by default the one that ``hf auth login`` stored.
        subfolder: the folder in the repository that has the files; by default its top.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a revision is given, and the name is no repository's or that of a local path; or
            the subfolder is no relative path below the folder.
        FileNotFoundError: the hub has no such repository or revision, or it has none of the files.
        ConnectionError: the hub cannot be reached, and the repository is not in the cache.
    """
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(
            f"subfolder={subfolder!r} is a path below the folder or repository, such as 'lora'; give the "
            "path of a folder elsewhere as the folder itself"
        )
    path = Path(folder)
    if path.exists() or not is_repository(folder):
        if revision is not None:
            found = "is a path on this machine" if path.exists() else "is no repository's name"
            raise ValueError(
                f"revision={revision!r} goes with a repository of the hub, user/name, but {str(folder)!r} "
                f"{found}"
            )
        return path / inside if subfolder else path
    import huggingface_hub

    with _explained(f"there is no folder {folder!r} here", str(folder), revision):
        downloaded = huggingface_hub.snapshot_download(
            str(folder),
            revision=revision,
            token=token,
            allow_patterns=[str(inside / file) for file in files],
        )
    place = Path(downloaded) / inside
    if not any((place / file).is_file() for file in files):
        where = f"in its folder {str(inside)!r}" if inside.parts else "at its top"
        raise FileNotFoundError(
            f"the repository {folder!r} has none of {', '.join(files)} {where}. If its adapters are in "
            "folders, give the name of one as subfolder="
        )
    return place


class HubPlace(TypedDict):
    """Where an adapter is: the arguments of the functions that read a folder or a repository."""

    revision: str | None
    token: str | bool | None
    subfolder: str | None


#: The kind of an argument that says one thing of all folders, or one of each.
FOR_EACH = Kind(
    "a text, or a list with one for each folder",
    lambda value: TEXT.fits(value) or are(TEXT.or_none.fits)(value),
)


def each_place(
    number: int,
    revision: str | Sequence[str | None] | None = None,
    token: str | bool | None = None,
    subfolder: str | Sequence[str | None] | None = None,
) -> list[HubPlace]:
    """Return the place of each of several adapters.

    Args:
        number: how many folders or repositories there are.
        revision: one for all of them, or a list with one for each; None is ``main``.
        token: a token of the hub for all of them.
        subfolder: one for all of them, or a list with one for each; None and ``"."`` are the top.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a list of another length.

    Example:
        >>> [each["subfolder"] for each in each_place(2, subfolder=[".", "lora"])]
        ['.', 'lora']
        >>> each_place(1, revision="v2")
        [{'revision': 'v2', 'token': None, 'subfolder': None}]
    """
    FOR_EACH.or_none.check("revision", revision)
    FOR_EACH.or_none.check("subfolder", subfolder)
    return [
        HubPlace(revision=own, token=token, subfolder=inside)
        for own, inside in zip(
            _for_each("revision", revision, number), _for_each("subfolder", subfolder, number)
        )
    ]


def _for_each(
    name: str, value: str | Sequence[str | None] | None, number: int
) -> Sequence[str | None]:
    values = [value] if value is None or isinstance(value, str) else list(value)
    if len(values) not in (1, number):
        raise ValueError(
            f"{name} must be one for all folders or one for each; found {len(values)} for {number} folders"
        )
    return values if len(values) == number else values * number


def upload(
    folder: Path,
    repository: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    replace_card: bool = False,
) -> str:
    """Upload the files of a folder to a repository in one commit, and return the address of the commit.

    Args:
        folder: the folder.
        repository: ``user/name``; it is made if it does not exist.
        message: the message of the commit.
        private: whether a new repository is private; by default what the user or organisation has set.
        revision: the branch, which is made if it does not exist; by default ``main``.
        token: a token of the hub that may write.
        replace_card: whether a README.md that is in the repository is replaced.

    Raises:
        ValueError: the name has another form than ``user/name``.
        FileNotFoundError: the token may not see or write the repository.
        ConnectionError: the hub cannot be reached, or refuses.
    """
    if not is_repository(repository):
        raise ValueError(
            f"a repository of the hub is named user/name, with letters, digits, '-', '_' and '.'; "
            f"found {repository!r}"
        )
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with _explained("nothing was uploaded", repository, revision):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        keep = not replace_card and api.file_exists(repository, "README.md", revision=revision)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            ignore_patterns=["README.md"] if keep else None,
        )
    return str(done.commit_url)


@contextmanager
def _explained(outcome: str, repository: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one that says what to try."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Errors of the system, and of the HTTP library below huggingface_hub, such as a refused connection.
    errors: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # type: ignore
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{outcome}, and the repository {repository!r} of the hub has no revision {revision!r}"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{outcome}, and the hub shows this token no repository {repository!r}. Look at the name; "
            "for a private or gated one log in with `hf auth login`, or pass token="
        ) from error
    except errors as error:
        offline = huggingface_hub.is_offline_mode()
        why = (
            "HF_HUB_OFFLINE is set"
            if offline
            else str(error).strip().partition("\n")[0] or repr(error)
        )
        remedy = "unset it" if offline else "look at the connection and the token"
        raise ConnectionError(
            f"{outcome}, and the hub cannot be asked for the repository {repository!r}: {why}. "
            f"To use the hub, {remedy}; otherwise give the path of a folder"
        ) from error
