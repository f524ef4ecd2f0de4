"""Where a checkpoint lies: a folder, or a repository of the Hugging Face hub, from which only data is downloaded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source:
    """A folder, or a repository of the hub at one commit.

    Args:
        source: the folder, or "owner/name".
        revision: branch, tag or commit of the repository; the main branch if None.
        dtype: what the parameters are to be, which is checked before anything is read.

    Raises:
        TypeError, NotADirectoryError, FileNotFoundError: as `is_hub_id`.
        ValueError: dtype is no floating point one, or a folder with a revision.
    """

    def __init__(self, source: str | os.PathLike[str], revision: str | None, dtype: torch.dtype | None):
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating point torch.dtype or None, got {dtype!r}")
        self.remote = is_hub_id(source)
        if revision is not None and not self.remote:
            raise ValueError(f"revision: a folder has none, only a repository of the hub, got {revision!r}")
        self.source, self.revision = source, revision

    def fetch(self, files: Sequence[str]) -> Path:
        """Returns the folder, into which these files have been downloaded if it is a repository that has them."""
        if not self.remote:
            return Path(self.source)
        folder = download(str(self.source), self.revision, files)
        self.revision = folder.name  # the commit, wherever the branch is at the next call
        return folder


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Returns whether `source` is no folder here but a name that the hub could have.

    Raises:
        TypeError: neither a string nor a path.
        NotADirectoryError: a file.
        FileNotFoundError: neither a folder nor such a name.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a folder or a hub id, got {type(source).__name__} {source!r}")
    if Path(source).is_dir():
        return False
    if Path(source).exists():
        raise NotADirectoryError(f"{source}: expected the folder of a checkpoint, or a hub id, got a file")
    if not isinstance(source, str) or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such folder, nor a hub id such as 'state-spaces/mamba-130m-hf'")
    return True


def download(source: str, revision: str | None, files: Sequence[str]) -> Path:
    """Downloads files of a repository, those it has, into the hub's cache and returns their folder.

    Args:
        source: the repository, "owner/name".
        revision: branch, tag or commit; the main branch if None.
        files: their names; nothing else is fetched.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: no such repository or revision, or none that one may read.
        ConnectionError: the hub cannot be reached or breaks off, and the cache does not have the files.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{source}: no folder of this name is here, and to download it from the hub huggingface_hub is needed, "
            "which is not installed: pip install 'linrnn[hf]'"
        ) from error
    at = source if revision is None else f"{source} at revision {revision!r}"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except errors.LocalEntryNotFoundError as error:
        reason = first_line(error.__cause__ or error)
        raise ConnectionError(
            f"{at}: no such folder is here, the hub cannot be reached, and its cache does not have it ({reason})"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{at}: neither a folder here nor on the hub; if it is private or gated, ask for access and log in "
            f"with `hf auth login` ({first_line(error)})"
        ) from error
    except Exception as error:
        # an answer of the hub that is no file, or an error of the client's own HTTP library, whichever that is
        if not isinstance(error, errors.HfHubHTTPError) and not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(f"{at}: the download broke off, run again to go on ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """Returns what an error says, without its advice, or its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
