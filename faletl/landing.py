"""Landing: pages as fal sent them, on disk, with a sealed manifest. Alone knows landing paths.

    <landing>/<account>/<resource>/<window start>/<load id>/<call>-<page>.json.zst
                                                           /manifest.json
                                                           /loaded.json

A read of a window lands in a folder of its own, which nobody changes once its manifest is there. Each
page goes to a temporary name, is flushed to the disk, and is then renamed: a page that has its name
is whole. Without a manifest the read is not complete, but its pages may be taken up again. What was
loaded has a receipt beside it, so that the history of the warehouse lies with its pages.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal

import filelock
import msgspec
import zstandard

from faletl.client import Params
from faletl.config import REDACTED, Settings
from faletl.errors import StorageError, TamperedError, UsageError
from faletl.pages import Page
from faletl.resources import RESOURCES
from faletl.windows import Window

FORMAT = 1
MANIFEST = "manifest.json"
RECEIPT = "loaded.json"
_LOCK = ".reading"
_PAGE = ".json.zst"
_STAMP = "%Y%m%dT%H%M%S%fZ"
_LOAD_ID = re.compile(r"\d{8}T\d{12}Z-[0-9a-f]{6}")


class LandedPage(msgspec.Struct, frozen=True):
    """One page on disk. `bytes` and `sha256` are those of the file as it lies there."""

    file: str
    rows: int
    bytes: int
    sha256: str
    request_id: str | None = None


class Call(msgspec.Struct, frozen=True):
    """One walk: the question (never the key) and the pages that answered it, in order.

    `label` is `rows` for the records, `proof` for fal's control total, `again` for another walk of
    the records: one that stands in for a control total which fal refused, or the one before.
    """

    label: str
    path: str
    query: dict[str, list[str]]
    pages: list[LandedPage]


class Manifest(msgspec.Struct, frozen=True):
    """What a complete read of a window holds.

    `planned_from` is the first day that the run meant to read of this resource. `fencing_token` is
    the newest one that was known when the read was planned: whatever was loaded under a greater one
    may be newer than this read. `is_whole_catalogue`: all of fal's endpoints were asked for.
    """

    load_id: str
    run_id: str
    account: str
    resource: str
    window_start: datetime
    window_end: datetime
    started_at: datetime
    finished_at: datetime
    planned_from: date
    fencing_token: int
    calls: list[Call]
    unknown_ids: list[str] = []
    is_whole_catalogue: bool = False
    redacted_pages: int = 0
    faletl_version: str = ""
    format: int = FORMAT

    @property
    def window(self) -> Window:
        """The window that was read."""
        return Window(self.window_start, self.window_end)

    def pages(self, label: str) -> list[LandedPage]:
        """The pages of all calls with that label, in order."""
        return [page for call in self.calls if call.label == label for page in call.pages]

    def has(self, label: str) -> bool:
        """Whether such a walk was made; it may have had no rows."""
        return any(call.label == label for call in self.calls)

    @property
    def asked_ids(self) -> frozenset[str]:
        """The endpoint ids that fal answered for."""
        return frozenset(
            endpoint_id
            for call in self.calls
            if call.label == "rows"
            for endpoint_id in call.query.get("endpoint_id", [])
        )


class Receipt(msgspec.Struct, frozen=True, order=True):
    """That a read was loaded: under which token, when, and whether its rows were news or known."""

    fencing_token: int
    loaded_at: datetime
    outcome: Literal["loaded", "unchanged"]


class Landed(msgspec.Struct, frozen=True):
    """A complete read: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def body(self, page: LandedPage) -> bytes:
        """The page as fal sent it.

        Raises:
            TamperedError: the file is gone, or is not the one that was landed.
        """
        path = self.folder / Path(page.file).name
        try:
            content = path.read_bytes()
        except (FileNotFoundError, ValueError):
            content = b""
        if hashlib.sha256(content).hexdigest() != page.sha256:
            raise TamperedError(
                f"the landed page {path} is not the one that fal sent; restore it, or read the window "
                "again with faletl run --start … --end …",
                file=str(path),
            )
        return zstandard.ZstdDecompressor().decompress(content)


class Attempt:
    """A read of one window under way: lands pages, then seals them with a manifest."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.load_id = folder.name
        self.started_at = _started_at(folder.name)
        self._settings = settings
        self._redacted = 0
        self._lock = filelock.FileLock(folder / _LOCK, timeout=0, thread_local=False)
        self._lock.acquire()

    def landed(self, label: str, params: Params) -> Iterator[bytes]:
        """The pages of this very question that an interrupted read left, in order."""
        for number in range(1, 1 + sum(1 for _ in self.folder.iterdir())):
            path = self.folder / page_name(label, params, number)
            try:
                body = zstandard.ZstdDecompressor().decompress(path.read_bytes())
            except (FileNotFoundError, zstandard.ZstdError):
                return  # ask fal from here on
            self._redacted += REDACTED.encode() in body
            yield body

    def land(self, label: str, params: Params, page: Page) -> LandedPage:
        """Write the page for good, without the key should fal have echoed it; raises StorageError."""
        body = self._settings.redact_bytes(page.body)
        self._redacted += body != page.body
        content = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(body)
        name = page_name(label, params, page.number)
        write_durably(self.folder / name, content)
        return _described(name, content, page)

    def adopt(self, landed: Landed) -> list[Call]:
        """Take over the rows of an earlier read as the `again` walk of this one; raises StorageError."""
        calls = [call for call in landed.manifest.calls if call.label == "rows"]
        taken = []
        for number, call in enumerate(calls):
            pages = []
            for page in call.pages:
                name = f"again-{number}-{page.file}"
                write_durably(self.folder / name, (landed.folder / page.file).read_bytes())
                pages.append(msgspec.structs.replace(page, file=name))
            taken.append(msgspec.structs.replace(call, label="again", pages=pages))
        return taken

    def take_in(self, other: Attempt) -> None:
        """Make the pages of another unfinished read ones of this, and let that one go."""
        for path in other.folder.iterdir():
            if path.name.endswith(_PAGE):
                path.replace(self.folder / path.name)
        sync_folder(self.folder)
        other.discard()

    def described(self, label: str, params: Params, page: Page) -> LandedPage:
        """The record of a page that was landed before."""
        name = page_name(label, params, page.number)
        return _described(name, (self.folder / name).read_bytes(), page)

    def seal(self, manifest: Manifest) -> Landed:
        """Make the read complete: from here on nothing in the folder changes."""
        sealed = msgspec.structs.replace(manifest, redacted_pages=self._redacted)
        kept = {page.file for call in sealed.calls for page in call.pages} | {_LOCK}
        for path in self.folder.iterdir():  # a batch that was halved, a page of an older question
            if path.name not in kept:
                path.unlink()
        content = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
        write_durably(self.folder / MANIFEST, content)
        self.close()
        return Landed(self.folder, sealed)

    def close(self) -> None:
        """Let go of the folder; without a manifest the next read may take it up."""
        self._lock.release()
        if (self.folder / MANIFEST).exists():
            (self.folder / _LOCK).unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget the read."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def new_load_id(at: datetime) -> str:
    """When the read began, and chance."""
    return f"{at.astimezone(UTC).strftime(_STAMP)}-{secrets.token_hex(3)}"


def begin(settings: Settings, account: str, resource: str, window: Window, at: datetime) -> Attempt:
    """Open a new folder for a read of the window; raises StorageError."""
    while True:
        load_id = new_load_id(at)
        folder = _window_folder(settings, account, resource, window) / load_id
        try:
            _make_private(folder)
            return Attempt(folder, settings)
        except filelock.Timeout:
            continue  # another run took the folder up before we locked it; it may have it
        except OSError as error:
            raise storage_error(error, folder) from None


def resume(
    settings: Settings, account: str, resource: str, window: Window, since: datetime
) -> Attempt | None:
    """The newest unfinished read of the window that began after `since` and that nobody works on."""
    parent = _window_folder(settings, account, resource, window)
    for folder in sorted(_load_folders(parent), reverse=True):
        if (folder / MANIFEST).exists() or _started_at(folder.name) < since:
            return None
        try:
            attempt = Attempt(folder, settings)
        except filelock.Timeout:
            continue
        if not (folder / MANIFEST).exists():
            return attempt
        attempt.close()  # it was finished just now
        return None
    return None


def open_ahead(
    settings: Settings, account: str, resource: str, window: Window, load_id: str
) -> Attempt | None:
    """The unfinished read of that id, made if need be; None if it is done or somebody works on it."""
    folder = _window_folder(settings, account, resource, window) / load_id
    try:
        _make_private(folder)
        attempt = Attempt(folder, settings)
    except filelock.Timeout:
        return None
    except OSError as error:
        raise storage_error(error, folder) from None
    if (folder / MANIFEST).exists():
        attempt.close()
        return None
    return attempt


def gather(
    settings: Settings,
    account: str,
    resource: str,
    window: Window,
    ahead: Sequence[str],
    since: datetime,
) -> Attempt | None:
    """One read with the pages of all those asked ahead; None if they began before, or are not to be had.

    It counts as begun when the first of them was: none of its pages is older.
    """
    if not ahead or _started_at(ahead[0]) < since:
        return None
    whole = open_ahead(settings, account, resource, window, ahead[0])
    for load_id in ahead[1:] if whole else ():
        part = open_ahead(settings, account, resource, window, load_id)
        if whole and part:
            whole.take_in(part)
    return whole


def read_of_run(
    settings: Settings, account: str, resource: str, window: Window, run_id: str
) -> Landed | None:
    """The newest complete read of the window by that run; raises TamperedError, as `open_read`."""
    for folder in sorted(
        _load_folders(_window_folder(settings, account, resource, window)), reverse=True
    ):
        if (folder / MANIFEST).exists():
            landed = open_read(folder)
            if landed.manifest.run_id == run_id and landed.manifest.window == window:
                return landed
    return None


def complete_reads(settings: Settings, day: date | None = None) -> Iterator[Path]:
    """The folder of every complete read (of one UTC day), oldest first within each window."""
    for path in sorted(Path(settings.landing).glob(f"*/*/{day or '*'}/*/{MANIFEST}")):
        yield path.parent


def is_intact(folder: Path) -> bool:
    """Whether a complete read is still there, byte for byte."""
    try:
        landed = open_read(folder)
        for call in landed.manifest.calls:
            for page in call.pages:
                landed.body(page)
    except TamperedError:
        return False
    return True


def receipt_of(folder: Path) -> Receipt | None:
    """The receipt for a read that was loaded; None without a (readable) one."""
    try:
        return msgspec.json.decode((folder / RECEIPT).read_bytes(), type=Receipt)
    except (OSError, msgspec.MsgspecError):
        return None


def leave_receipt(folder: Path, receipt: Receipt) -> None:
    """Write down that the read is loaded now; raises StorageError."""
    write_durably(folder / RECEIPT, msgspec.json.encode(receipt))


def take_receipt(folder: Path) -> None:
    """Forget that the read was loaded: another one stands in for it."""
    (folder / RECEIPT).unlink(missing_ok=True)


def open_read(folder: Path) -> Landed:
    """The complete read in that folder.

    Raises:
        TamperedError: its manifest is not one of ours.
        UsageError: it was landed by a newer faletl.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        _ = manifest.window  # raises ValueError for one that cannot be
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise TamperedError(f"{path} cannot be read: {error}") from None
    if manifest.format > FORMAT or manifest.resource not in RESOURCES:
        raise UsageError(f"{path} was landed by faletl {manifest.faletl_version}; upgrade faletl")
    return Landed(folder, manifest)


def all_reads(settings: Settings) -> Iterator[Path]:
    """The folder of every read, complete or not."""
    for window in sorted(Path(settings.landing).glob("*/*/*")):
        yield from sorted(_load_folders(window))


def interrupted_reads(settings: Settings, before: datetime) -> Iterator[Path]:
    """The folder of every read that began before then, is not complete, and is nobody's at work."""
    for folder in all_reads(settings):
        if not (folder / MANIFEST).exists() and _started_at(folder.name) < before:
            try:
                Attempt(folder, settings).close()
            except filelock.Timeout:
                continue
            yield folder


def drop(folder: Path) -> None:
    """Delete a read; the manifest first, so that what a kill leaves of it is no complete read.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
        with suppress(OSError):  # other reads of the window are there
            folder.parent.rmdir()
    except OSError as error:
        raise storage_error(error, folder) from None


def size(folder: Path) -> int:
    """The bytes of the files of a read; of one under way, about."""
    total = 0
    with suppress(FileNotFoundError):  # a page gets its name, a read is dropped
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def relative_path(settings: Settings, folder: Path) -> str:
    """Where the read lies below the landing folder."""
    return folder.relative_to(Path(settings.landing)).as_posix()


def page_name(label: str, params: Params, number: int) -> str:
    """The file of a page: nothing that fal sent is part of it, the question only as a digest."""
    question = msgspec.json.encode(dict(sorted(params.items())))
    return f"{label}-{hashlib.sha256(question).hexdigest()[:12]}-{number:05d}{_PAGE}"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it has its name only when it is whole and on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from None


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(name: str, content: bytes, page: Page) -> LandedPage:
    digest = hashlib.sha256(content).hexdigest()
    return LandedPage(name, page.rows, len(content), digest, page.request_id)


def _window_folder(settings: Settings, account: str, resource: str, window: Window) -> Path:
    # A day has a folder for all its reads; snapshots of a day lie side by side.
    return Path(settings.landing) / _slug(account) / resource / window.day.isoformat()


def _make_private(folder: Path) -> None:
    """Make the folder and those above it, for this user only."""
    if not folder.parent.exists():
        _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _load_folders(parent: Path) -> list[Path]:
    found = parent.iterdir() if parent.is_dir() else ()
    return [path for path in found if _LOAD_ID.fullmatch(path.name)]


def _started_at(load_id: str) -> datetime:
    return datetime.strptime(load_id.split("-")[0], _STAMP).replace(tzinfo=UTC)


def _slug(label: str) -> str:
    """A folder name for any account label; labels that differ never share one."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", label):
        return label
    readable = re.sub(r"[^a-z0-9_-]+", "-", label.lower()).strip("-")[:40]
    return f"{readable or 'account'}.{hashlib.sha256(label.encode()).hexdigest()[:12]}"


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error for a disk that refuses, with the room that is left there."""
    try:
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path()).free
    except OSError:
        free = -1
    reason = error.strerror or str(error)
    return StorageError(f"cannot write {path}: {reason} ({free:,} bytes free there)", file=str(path))
