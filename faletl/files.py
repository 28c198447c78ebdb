"""Files of this machine: scratch folders, copies, flushes, free space."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import filelock

from faletl.errors import StorageError

_CHUNK_BYTES = 256 * 2**20  # the most that is copied before a signal is noticed


def sql_folder() -> Path:
    """Return the folder of the SQL: inside the installed package, or next to it in a checkout."""
    inside = Path(__file__).parent / "sql"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "sql"


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; on some file systems both files share their blocks until one of them changes.

    On XFS and Btrfs the copy then takes hardly any time, and space only for later changes.
    """
    target.unlink(missing_ok=True)  # it may be another name of the source
    copy_range = getattr(os, "copy_file_range", None)  # not on every system, nor in every Python
    if copy_range is not None:
        with source.open("rb") as old, target.open("wb") as new, suppress(OSError):
            while copy_range(old.fileno(), new.fileno(), _CHUNK_BYTES):
                pass
            if new.seek(0, os.SEEK_END) == old.seek(0, os.SEEK_END):
                return
    shutil.copyfile(source, target)  # the system could not: this copies, or raises the reason


_UNLOCKED, _SCRATCH, _LOCK = ".faletl-new-", "faletl-", ".held"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder below TMPDIR, or hidden in `parent`; raises StorageError.

    A process that is killed cannot delete its own folder: a later one does.
    """
    with ExitStack() as stack:
        try:
            unlocked = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent))
            stack.callback(shutil.rmtree, unlocked, ignore_errors=True)
            stack.enter_context(filelock.FileLock(unlocked / _LOCK, thread_local=False))
            # It gets its name once it is locked: any process may delete a folder that is not locked.
            prefix = _SCRATCH if parent is None else f".{_SCRATCH}"
            folder = unlocked.with_name(prefix + unlocked.name.removeprefix(_UNLOCKED))
            shutil.move(unlocked, folder)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        except OSError as error:
            path = error.filename or parent or os.environ.get("TMPDIR") or "/"
            raise storage_error(error, Path(path)) from None
        _delete_abandoned(folder.parent)
        yield folder


@cache
def _delete_abandoned(parent: Path) -> None:
    """Delete abandoned scratch folders of this user, once in each process."""
    for folder in abandoned_scratch(parent):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_scratch(parent: Path) -> Iterator[Path]:
    """Yield scratch folders of this user that no process locks: their commands were killed."""
    for folder in (*parent.glob(f"{_SCRATCH}*"), *parent.glob(f".{_SCRATCH}*")):
        lock = folder / _LOCK
        try:
            status = folder.lstat()
            is_unlocked = folder.name.startswith(_UNLOCKED)
            if status.st_uid != os.geteuid() or (is_unlocked and _is_young(status)):
                continue
            if lock.exists():
                with filelock.FileLock(lock, timeout=0, thread_local=False):
                    pass
            elif not is_unlocked:
                continue  # it is another kind of folder
        except (filelock.Timeout, OSError):  # it is locked, or has just been deleted
            continue
        yield folder


def _is_young(status: os.stat_result) -> bool:
    """Whether the process that made the folder may be about to lock it."""
    return abs(time.time() - status.st_mtime) < 60


def storage_error(error: OSError, path: Path, needed: int = 0) -> StorageError:
    """Return the error for a disk that refuses a write, with the bytes needed and the bytes free."""
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # a file is where a folder must be made
        reason = os.strerror(errno.ENOTDIR)
    return StorageError(f"cannot write {path}: {reason} ({free_space(path, needed)})", file=str(path))


def free_space(path: Path, needed: int = 0) -> str:
    """Return the bytes needed, and the free space on the disk of the path, as a phrase."""
    need = f"{needed:,} bytes needed, " if needed else ""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            disk = os.statvfs(folder)
            files = "" if disk.f_favail or not disk.f_files else ", but no more files"
            return f"{need}{disk.f_bavail * disk.f_frsize:,} bytes free there{files}"
    return f"{need}free space unknown"


def listing(folder: Path) -> list[Path]:
    """Return the paths in the folder; an empty list where there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []
