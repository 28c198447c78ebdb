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

_CHUNK = 256 * 2**20  # bytes; a signal waits for so many at most


def sql_folder() -> Path:
    """Where the SQL lies: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "sql"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "sql"


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; where the file system can, both share their blocks until one of them changes.

    XFS and Btrfs can: hardly any time then, and room only for what changes later.
    """
    target.unlink(missing_ok=True)  # it may be another name of the source
    copy_range = getattr(os, "copy_file_range", None)  # not on every system, nor in every Python
    if copy_range is not None:
        with source.open("rb") as old, target.open("wb") as new, suppress(OSError):
            while copy_range(old.fileno(), new.fileno(), _CHUNK):
                pass
            if new.seek(0, os.SEEK_END) == old.seek(0, os.SEEK_END):
                return
    shutil.copyfile(source, target)  # the system could not, or would not: this copies, or says why


_UNHELD, _SCRATCH, _HELD = ".faletl-new-", "faletl-", ".held"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder below TMPDIR, or hidden in `parent`, as long as it is needed; raises StorageError.

    A process that is killed cannot delete its own: a later one does.
    """
    with ExitStack() as stack:
        try:
            made = Path(tempfile.mkdtemp(prefix=_UNHELD, dir=parent))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(filelock.FileLock(made / _HELD, thread_local=False))
            # It gets its name when it is held: whoever finds one that is not may delete it.
            shown = _SCRATCH if parent is None else f".{_SCRATCH}"
            folder = made.with_name(shown + made.name.removeprefix(_UNHELD))
            shutil.move(made, folder)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        except OSError as error:
            told = error.filename or parent or os.environ.get("TMPDIR") or "/"
            raise storage_error(error, Path(told)) from None
        _delete_what_the_dead_left(folder.parent)
        yield folder


@cache
def _delete_what_the_dead_left(parent: Path) -> None:
    """Once a process: delete scratch folders of this user that nobody holds any more."""
    for folder in abandoned_scratch(parent):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_scratch(parent: Path) -> Iterator[Path]:
    """Scratch folders of this user that nobody holds any more: their commands were killed."""
    for folder in (*parent.glob(f"{_SCRATCH}*"), *parent.glob(f".{_SCRATCH}*")):
        lock = folder / _HELD
        try:
            found = folder.lstat()
            if found.st_uid != os.geteuid() or (folder.name.startswith(_UNHELD) and _is_young(found)):
                continue
            if lock.exists():
                with filelock.FileLock(lock, timeout=0, thread_local=False):
                    pass
            elif not folder.name.startswith(_UNHELD):
                continue  # it is no folder of this kind
        except (filelock.Timeout, OSError):  # it is held, or gone in this moment
            continue
        yield folder


def _is_young(found: os.stat_result) -> bool:
    """Whether whoever made the folder may be about to hold it."""
    return abs(time.time() - found.st_mtime) < 60


def storage_error(error: OSError, path: Path, needed: int = 0) -> StorageError:
    """The error for a disk that refuses, with what was needed and what is left there."""
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # where a folder was to be made
        reason = os.strerror(errno.ENOTDIR)
    return StorageError(f"cannot write {path}: {reason} ({free_space(path, needed)})", file=str(path))


def free_space(path: Path, needed: int = 0) -> str:
    """What is free where the path is, beside what was needed."""
    wanted = f"{needed:,} bytes needed, " if needed else ""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            found = os.statvfs(folder)
            files = "" if found.f_favail or not found.f_files else ", but no more files"
            return f"{wanted}{found.f_bavail * found.f_frsize:,} bytes free there{files}"
    return f"{wanted}what is free there is unknown"


def listing(folder: Path) -> list[Path]:
    """What lies in the folder; nothing where there is none, or no folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []
