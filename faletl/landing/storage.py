"""Places: a folder on a disk or a prefix in an object store, and all that is different between them.

A path of universal-pathlib stands for one of pathlib in all that concerns names. What reads and writes
is asked of `at(path)`, never of the path: an object store has no renames, no flushing and no locks, and
where it did not answer, universal-pathlib may say that nothing is there.
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
"""Pages are small: s3fs would ask for the size of each first, to read a large one in parts."""


_WRITTEN_WITHIN = timedelta(days=1)

_opening = Lock()


def parse_location(setting: str) -> Path:
    """The folder or file of that path or URL; raises SettingsError where what reads it is missing."""
    scheme, is_url, rest = setting.partition("://")
    if not is_url:
        return Path(setting)
    bucket, _, below = rest.partition("/")
    with _opening:
        opened = _bucket(scheme, bucket, os.getpid())
    return opened / below if below else opened


@cache  # a client for all threads; a forked process makes one of its own
def _bucket(scheme: str, bucket: str, _process: int) -> Path:
    # Listings that are kept would not show what other threads and processes wrote.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        from upath import UPath

        opened = UPath(f"{scheme}://{bucket}", **options, **_OPTIONS.get(scheme, {}))
        _ = opened.fs  # all paths below share it
    except ImportError as error:
        raise SettingsError(
            f"FALETL_LANDING: what reads {scheme}:// is not installed ({error.msg}); "
            + how_to_install("s3")
            + f", and what fsspec names for {scheme}" * (scheme != "s3")
        ) from None
    except ValueError as error:
        raise SettingsError(f"FALETL_LANDING: {scheme}:// is no object store: {error}") from None
    return cast(Path, opened)


@cache
def check_reachable(url: str) -> None:
    """Raises StorageError where the store does not answer, refuses us, or has no such bucket.

    It is asked once.
    """
    folder = parse_location(url)
    backend_for(folder).names(folder)


class Disk:
    """A folder on a disk: files are renamed into their place, and a lock tells who works in a folder."""

    has_locks: ClassVar[bool] = True
    grace: ClassVar[timedelta] = timedelta(0)
    """How long a folder that nobody finished is left alone, in case that somebody still works in it."""

    @staticmethod
    def read(path: Path) -> bytes:
        """The content of a regular file; of a pipe or device there is none; raises OSError."""
        with open(path, "rb", opener=_without_waiting) as file:  # Path.open has no opener
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileNotFoundError(errno.ENOENT, "it is no file", str(path))
            return file.read()

    @staticmethod
    def write(path: Path, content: bytes) -> None:
        """Write a file so that it has its name only when it is whole and on the disk; raises OSError."""
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
                part.unlink()  # what a full disk took of it
            raise
        sync(path.parent)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether the file is there."""
        return path.exists()

    @staticmethod
    def names(folder: Path) -> list[str]:
        """What lies in the folder; nothing where there is none."""
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    @staticmethod
    def matching(folder: Path, pattern: str) -> list[Path]:
        """Files and folders below that match, in the order of their names; raises OSError.

        `Path.glob` takes a folder that cannot be listed for an empty one.
        """
        found = [folder]
        for part in PurePosixPath(pattern).parts:
            found = [path for one in found for path in listing(one) if fnmatchcase(path.name, part)]
        return sorted(found)

    @staticmethod
    def make(folder: Path) -> None:
        """Make the folder and those above it, for this user only; raises OSError.

        They survive a power cut, or what is flushed in them would be lost all the same.
        """
        if folder.is_dir():
            return
        Disk.make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync(folder.parent)

    @staticmethod
    def move(folder: Path, names: Iterable[str], to: Path) -> None:
        """Make these files ones of the other folder; raises OSError."""
        for name in names:
            (folder / name).replace(to / name)
        sync(to)

    @staticmethod
    def delete(path: Path) -> None:
        """Delete the file, if it is there; raises OSError."""
        path.unlink(missing_ok=True)

    @staticmethod
    def drop(folder: Path) -> None:
        """Delete the folder with all that is in it, of a link the link alone; raises OSError."""
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)

    @staticmethod
    def is_own_folder(path: Path) -> bool:
        """Whether it is a folder itself, and no link to one."""
        return path.is_dir() and not path.is_symlink()

    @staticmethod
    def drop_empty(folder: Path) -> None:
        """Delete the folder, if nothing is in it."""
        with suppress(OSError):
            folder.rmdir()

    @staticmethod
    def size(path: Path) -> int:
        """The bytes of a file; of one that is gone, none."""
        with suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    @staticmethod
    def sizes(folder: Path) -> list[int]:
        """The bytes of each of its files; of files under way, about."""
        found = []
        with suppress(FileNotFoundError):  # a page gets its name, a read is dropped
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    found.append(path.stat().st_size)
        return found

    @staticmethod
    def unfinished(folder: Path) -> Iterator[Path]:
        """Files that were never renamed into their place, by writers that were killed.

        Writing one takes seconds, so one that is a day old has no writer any more.
        """
        for path in folder.glob(".*.part"):
            with suppress(FileNotFoundError):  # it gets its name
                if time.time() - path.stat().st_mtime > _WRITTEN_WITHIN.total_seconds():
                    yield path

    @staticmethod
    def lock(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
        """Hold that lock file, when it is free; raises filelock.Timeout."""
        return filelock.FileLock(path, timeout=timeout, mode=0o600, thread_local=False)


class ObjectStore:
    """A prefix in an object store: an object appears whole or not at all, and everybody sees it at once.

    Who works under a prefix nobody can tell, so that each has one writer ever. Every method raises
    StorageError where the store refuses or does not answer.
    """

    has_locks: ClassVar[bool] = False
    grace: ClassVar[timedelta] = timedelta(days=1)

    @staticmethod
    def read(path: Path) -> bytes:
        """The content of an object; raises FileNotFoundError."""
        with _told(path):
            return cast(bytes, _fs(path).cat_file(_key(path)))

    @staticmethod
    def write(path: Path, content: bytes) -> None:
        """Write an object."""
        with _told(path, is_written=True):
            _fs(path).pipe_file(_key(path), content)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether the object is there."""
        return path.name in ObjectStore.names(path.parent)

    @staticmethod
    def names(folder: Path) -> list[str]:
        """What lies directly below the prefix."""
        return [PurePosixPath(one["name"]).name for one in _listed(folder)]

    @staticmethod
    def matching(folder: Path, pattern: str) -> list[Path]:
        """Objects and prefixes below that match, in the order of their names: of one listing of all."""
        depth = len(PurePosixPath(pattern).parts)
        with _told(folder):
            keys = _fs(folder).find(_key(folder))
        below = {PurePosixPath(key).relative_to(_key(folder)).parts for key in keys}
        names = {PurePosixPath(*parts[:depth]) for parts in below if len(parts) >= depth}
        return [folder / str(name) for name in sorted(names) if name.match(pattern)]

    @staticmethod
    def make(folder: Path) -> None:
        """Nothing: a prefix is there when something lies below it."""

    @staticmethod
    def delete(path: Path) -> None:
        """Delete the object, if it is there."""
        with suppress(FileNotFoundError), _told(path):
            _fs(path).rm_file(_key(path))

    @staticmethod
    def drop(folder: Path) -> None:
        """Delete all below the prefix."""
        with suppress(FileNotFoundError), _told(folder):
            _fs(folder).rm(_key(folder), recursive=True)

    @staticmethod
    def is_own_folder(_path: Path) -> bool:
        """True: there are no links."""
        return True

    @staticmethod
    def drop_empty(folder: Path) -> None:
        """Nothing: a prefix is gone with the last object below it."""

    @staticmethod
    def size(path: Path) -> int:
        """The bytes of an object; of one that is gone, none."""
        with suppress(FileNotFoundError), _told(path):
            return int(_fs(path).info(_key(path))["size"] or 0)
        return 0

    @staticmethod
    def sizes(folder: Path) -> list[int]:
        """The bytes of each object directly below the prefix."""
        return [one["size"] or 0 for one in _listed(folder)]

    @staticmethod
    def unfinished(_folder: Path) -> Iterator[Path]:
        """None: an object appears whole."""
        return iter(())

    @staticmethod
    def lock(path: Path, timeout: float = -1) -> AbstractContextManager[object]:
        """Nothing to hold."""
        return nullcontext()


def backend_for(path: Path) -> type[Disk] | type[ObjectStore]:
    """What reads and writes there."""
    return Disk if _fs(path) is None else ObjectStore


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it has its name only when it is whole and will last; raises StorageError."""
    try:
        backend_for(path).write(path, content)
    except OSError as error:
        raise storage_error(error, path, needed=len(content)) from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe, too, though nothing writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fs(path: Path) -> Any:
    """The file system of fsspec that the path is of, None for one of pathlib."""
    return getattr(path, "fs", None)


def _key(path: Path) -> str:
    return str(path.path)  # type: ignore[attr-defined]  # of a UPath


def _listed(folder: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError), _told(folder):
        return cast(list[dict[str, Any]], _fs(folder).ls(_key(folder), detail=True))
    return []


@contextmanager
def _told(path: Path, *, is_written: bool = False) -> Iterator[None]:
    """Errors of the store as one sentence; that there is no such object is for the caller to judge."""
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
        refused = "; check the store's credentials and what they allow" * _is_refusal(error)
        raise StorageError(f"cannot use {path}: {reason}{refused}", file=str(path)) from None


def _is_bucket_missing(error: BaseException) -> bool:
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or "credentials" in str(error).lower()
