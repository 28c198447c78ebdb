"""Storage backends for landed files: local disk and object store.

A path of universal-pathlib replaces one of pathlib in all that concerns names. Files are read and
written by the backend of a path, never by the path itself: an object store has no renames, no flushing
and no locks, and where it does not answer, universal-pathlib may report that nothing is there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, ClassVar, cast

import filelock

from faletl.errors import SettingsError, StorageError, how_to_install
from faletl.files import listing, storage_error, sync

_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}}
"""Pages are small, but s3fs would first request the size of each, to read large ones in parts."""


_WRITTEN_WITHIN = timedelta(days=1)

_opening = Lock()


def parse_location(setting: str) -> Path:
    """Return the folder or file of a path or URL; raises SettingsError if its library is missing."""
    scheme, is_url, rest = setting.partition("://")
    if not is_url:
        return Path(setting)
    bucket, _, below = rest.partition("/")
    with _opening:
        root = _bucket(scheme, bucket, os.getpid())
    return root / below if below else root


@cache  # one client for all threads; a forked process makes its own
def _bucket(scheme: str, bucket: str, _process: int) -> Path:
    # A cached listing would not show what other threads and processes wrote.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        from upath import UPath

        path = UPath(f"{scheme}://{bucket}", **options, **_OPTIONS.get(scheme, {}))
        _ = path.fs  # all paths below share it
    except ImportError as error:
        raise SettingsError(
            f"FALETL_LANDING: the library for {scheme}:// is not installed ({error.msg}); "
            + how_to_install("s3")
            + f", and the package that fsspec needs for {scheme}" * (scheme != "s3")
        ) from None
    except ValueError as error:
        raise SettingsError(f"FALETL_LANDING: {scheme}:// is not an object store: {error}") from None
    return cast(Path, path)


@cache
def check_reachable(url: str) -> None:
    """Raise StorageError if the store does not answer, refuses us, or has no such bucket.

    Each process asks once.
    """
    folder = parse_location(url)
    backend_for(folder).names(folder)


class Disk:
    """A local disk: files are renamed into their place, and a lock protects a folder in use."""

    has_locks: ClassVar[bool] = True
    grace: ClassVar[timedelta] = timedelta(0)
    """How long an unfinished folder is left alone, because another process may still use it."""

    @staticmethod
    def read(path: Path) -> bytes:
        """Return the content of a regular file; a pipe or device has none; raises OSError."""
        with open(path, "rb", opener=_without_waiting) as file:  # Path.open has no opener
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileNotFoundError(errno.ENOENT, "it is not a file", str(path))
            return file.read()

    @staticmethod
    def write(path: Path, content: bytes) -> None:
        """Write a file that gets its name only when it is complete and on the disk; raises OSError."""
        part = path.with_name(f".{path.name}.part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError:
            with suppress(OSError):
                part.unlink()  # the part that a full disk took
            raise
        sync(path.parent)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether the file is there."""
        return path.exists()

    @staticmethod
    def names(folder: Path) -> list[str]:
        """Return the names in the folder; empty if there is no such folder."""
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    @staticmethod
    def matching(folder: Path, pattern: str) -> list[Path]:
        """Return files and folders below that match, in the order of their names; raises OSError.

        `Path.glob` would treat a folder that cannot be listed as empty.
        """
        matches = [folder]
        for part in PurePosixPath(pattern).parts:
            children = (path for parent in matches for path in listing(parent))
            matches = [path for path in children if fnmatchcase(path.name, part)]
        return sorted(matches)

    @staticmethod
    def make(folder: Path) -> None:
        """Make the folder and those above it, for this user only; raises OSError.

        They survive a power cut; otherwise the files that are flushed in them would be lost.
        """
        if folder.is_dir():
            return
        Disk.make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync(folder.parent)

    @staticmethod
    def move(folder: Path, names: Iterable[str], to: Path) -> None:
        """Move these files to the other folder; raises OSError."""
        for name in names:
            (folder / name).replace(to / name)
        sync(to)

    @staticmethod
    def delete(path: Path) -> None:
        """Delete the file, if it is there; raises OSError."""
        path.unlink(missing_ok=True)

    @staticmethod
    def drop(folder: Path) -> None:
        """Delete the folder with all its contents, or only the link if it is one; raises OSError."""
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)

    @staticmethod
    def is_own_folder(path: Path) -> bool:
        """Return whether the path is a folder itself, not a link to one."""
        return path.is_dir() and not path.is_symlink()

    @staticmethod
    def drop_empty(folder: Path) -> None:
        """Delete the folder if it is empty."""
        with suppress(OSError):
            folder.rmdir()

    @staticmethod
    def size(path: Path) -> int:
        """Return the bytes of a file; 0 if it is gone."""
        with suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    @staticmethod
    def sizes(folder: Path) -> list[int]:
        """Return the bytes of each file in the folder; approximate for files that are being written."""
        sizes = []
        with suppress(FileNotFoundError):  # a page is renamed, an extract is deleted
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    sizes.append(path.stat().st_size)
        return sizes

    @staticmethod
    def unfinished(folder: Path) -> Iterator[Path]:
        """Yield files that were never renamed into their place, because their writers were killed.

        Writing a file takes seconds, so one that is a day old has no writer any more.
        """
        for path in folder.glob(".*.part"):
            with suppress(FileNotFoundError):  # it has just been renamed
                if time.time() - path.stat().st_mtime > _WRITTEN_WITHIN.total_seconds():
                    yield path

    @staticmethod
    def lock(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
        """Return a lock on this file, taken when it is free; raises filelock.Timeout."""
        return filelock.FileLock(path, timeout=timeout, mode=0o600, thread_local=False)


class ObjectStore:
    """An object store: an object appears complete or not at all, and all readers see it at once.

    A prefix cannot be locked, so each has only one writer ever. Every method raises StorageError if the
    store refuses or does not answer.
    """

    has_locks: ClassVar[bool] = False
    grace: ClassVar[timedelta] = timedelta(days=1)

    @staticmethod
    def read(path: Path) -> bytes:
        """Return the content of an object; raises FileNotFoundError."""
        with _translate_errors(path):
            return cast(bytes, _fs(path).cat_file(_key(path)))

    @staticmethod
    def write(path: Path, content: bytes) -> None:
        """Write an object."""
        with _translate_errors(path, is_written=True):
            _fs(path).pipe_file(_key(path), content)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether the object is there."""
        return path.name in ObjectStore.names(path.parent)

    @staticmethod
    def names(folder: Path) -> list[str]:
        """Return the names directly below the prefix."""
        return [PurePosixPath(entry["name"]).name for entry in _listed(folder)]

    @staticmethod
    def matching(folder: Path, pattern: str) -> list[Path]:
        """Return objects and prefixes below that match, in order of their names, by one listing."""
        depth = len(PurePosixPath(pattern).parts)
        with _translate_errors(folder):
            keys = _fs(folder).find(_key(folder))
        below = {PurePosixPath(key).relative_to(_key(folder)).parts for key in keys}
        names = {PurePosixPath(*parts[:depth]) for parts in below if len(parts) >= depth}
        return [folder / str(name) for name in sorted(names) if name.match(pattern)]

    @staticmethod
    def make(folder: Path) -> None:
        """Do nothing: a prefix exists when an object is below it."""

    @staticmethod
    def delete(path: Path) -> None:
        """Delete the object, if it is there."""
        with suppress(FileNotFoundError), _translate_errors(path):
            _fs(path).rm_file(_key(path))

    @staticmethod
    def drop(folder: Path) -> None:
        """Delete all objects below the prefix."""
        with suppress(FileNotFoundError), _translate_errors(folder):
            _fs(folder).rm(_key(folder), recursive=True)

    @staticmethod
    def is_own_folder(_path: Path) -> bool:
        """True: there are no links."""
        return True

    @staticmethod
    def drop_empty(folder: Path) -> None:
        """Do nothing: a prefix is gone with the last object below it."""

    @staticmethod
    def size(path: Path) -> int:
        """Return the bytes of an object; 0 if it is gone."""
        with suppress(FileNotFoundError), _translate_errors(path):
            return int(_fs(path).info(_key(path))["size"] or 0)
        return 0

    @staticmethod
    def sizes(folder: Path) -> list[int]:
        """Return the bytes of each object directly below the prefix."""
        return [entry["size"] or 0 for entry in _listed(folder)]

    @staticmethod
    def unfinished(_folder: Path) -> Iterator[Path]:
        """Yield nothing: an object appears complete."""
        return iter(())

    @staticmethod
    def lock(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
        """Return a lock that locks nothing."""
        return nullcontext()


def backend_for(path: Path) -> type[Disk] | type[ObjectStore]:
    """Return the backend that reads and writes this path."""
    return Disk if _fs(path) is None else ObjectStore


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that gets its name only when it is complete and durable; raises StorageError."""
    try:
        backend_for(path).write(path, content)
    except OSError as error:
        raise storage_error(error, path, needed=len(content)) from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe, too, though nothing writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fs(path: Path) -> Any:
    """Return the fsspec file system of a path; None for a path of pathlib."""
    return getattr(path, "fs", None)


def _key(path: Path) -> str:
    return str(path.path)  # type: ignore[attr-defined]  # of a UPath


def _listed(folder: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError), _translate_errors(folder):
        return cast(list[dict[str, Any]], _fs(folder).ls(_key(folder), detail=True))
    return []


@contextmanager
def _translate_errors(path: Path, *, is_written: bool = False) -> Iterator[None]:
    """Raise errors of the store as one sentence, except FileNotFoundError for a missing object."""
    try:
        yield
    except FileNotFoundError as error:
        if not (is_written or _is_bucket_missing(error)):
            raise
        raise StorageError(
            f"cannot use {path}: there is no such bucket; make it, or correct FALETL_LANDING",
            file=str(path),
        ) from None
    except Exception as error:  # noqa: BLE001  # each of fsspec's libraries raises errors of its own
        reason = re.sub(r"//[^/\s@]+@", "//", str(error).partition("\n")[0]) or type(error).__name__
        cure = "; check the store's credentials and permissions" * _is_refusal(error)
        raise StorageError(f"cannot use {path}: {reason}{cure}", file=str(path)) from None


def _is_bucket_missing(error: BaseException) -> bool:
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "credentials" in str(error).lower()
