"""Landing: pages as fal sent them, with a sealed manifest. Alone knows landing paths.

    <landing>/<account>/<resource>/<window start>/<load id>/<call>-<page>.json.zst
                                                           /manifest.json
                                                           /loaded.json (and loaded-<warehouse>.json)

A read of a window lands in a folder of its own, which nobody changes once its manifest is there. A
page that has its name is whole (storage.py). Without a manifest the read is not complete, but its
pages may be taken up again: where folders can be locked, by going on in its folder; where they cannot,
in another folder of its id and more chance, so that no two ever write to the same. So may those of a
complete read that a killed run had no time to load. What was loaded has a receipt beside it, so that the
history of the warehouse lies with its pages.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import filelock
import msgspec
import zstandard

from faletl.config import Settings
from faletl.errors import (
    DamagedExtractError,
    StorageError,
    TamperedError,
    UsageError,
    WarehouseBusyError,
)
from faletl.fal.bodies import one_body, take_turn
from faletl.fal.pages import Page
from faletl.files import storage_error
from faletl.landing.storage import Disk, backend_for, check_reachable, parse_location, write_durably
from faletl.redaction import REDACTED
from faletl.resources import RESOURCES
from faletl.windows import CLOCK_TOLERANCE, ExtractRef, Window, WindowKey
from faletl.wire import UNREADABLE, Params

FORMAT = 1
MANIFEST = "manifest.json"
RECEIPT = "loaded.json"
DECISIONS = ".decisions"
"""The folder of what people decided (faletl/landing/decisions.py)."""
PLANS = ".plans"
"""The folder of plans (faletl/line/distributed.py)."""
_LOCK = ".reading"
_DELETING = ".deleting"
_DISCARDED = "discarded"
_PAGE = ".json.zst"
_STAMP = "%Y%m%dT%H%M%S%fZ"
_LOAD_ID = re.compile(r"(?P<read>\d{8}T\d{12}Z-[0-9a-f]{6})(-[0-9a-f]{6})?", re.ASCII)
_RECEIPT_FILE = re.compile(r"loaded(-[0-9a-f]+)?\.json")
_PAGE_FILE = re.compile(r"[a-z0-9-]{1,100}" + re.escape(_PAGE))

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""One that can be compared with others."""


class LandedPage(msgspec.Struct, frozen=True):
    """One page on disk. `bytes` and `sha256` are those of the file as it lies there."""

    file: str
    rows: int
    bytes: int
    sha256: str
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not _PAGE_FILE.fullmatch(self.file):
            raise ValueError("a page has another name")


class Call(msgspec.Struct, frozen=True):
    """One walk: the question (never the key) and the pages that answered it, in order.

    `label` is `rows` for the records, `proof` for fal's control total behind them, `before` for that
    in front of records of several pages, `again` for another walk of the records: one that stands in
    for a control total which fal refused, or the one of the read before.
    """

    label: str
    path: str
    query: dict[str, list[str]]
    pages: list[LandedPage]

    @property
    def bounds(self) -> Window | None:
        """The window or the part of it that was asked for; None for a question without bounds."""
        if not {"start", "end"} <= self.query.keys():
            return None
        (start,), (end,) = self.query["start"], self.query["end"]
        return Window(datetime.fromisoformat(start), datetime.fromisoformat(end))


class Part(msgspec.Struct, frozen=True):
    """A part of a window that was asked for on its own, and the calls that answered it.

    Most windows are a single part. One whose pages do not add up is asked for again in halves.
    """

    window: Window
    calls: list[Call]

    def has(self, label: str) -> bool:
        """Whether such a walk was made; it may have had no rows."""
        return any(call.label == label for call in self.calls)

    @property
    def pages(self) -> int:
        """The number of pages that hold its rows."""
        return sum(len(call.pages) for call in self.calls if call.label == "rows")


class Manifest(msgspec.Struct, frozen=True):
    """What a complete read of a window holds.

    `planned_from` is the first day that the run meant to read of this resource. `fencing_token` is
    the newest one that was known when the read was planned: whatever was loaded under a greater one
    may be newer than this read. `is_whole_catalogue`: all of fal's endpoints were asked for.
    `fal_started_at` is fal's own clock when its first page was answered; None where fal did not say,
    and in manifests of an older faletl.
    """

    load_id: str
    run_id: str
    account: str
    resource: str
    window_start: datetime
    window_end: datetime
    started_at: Instant
    finished_at: Instant
    planned_from: date
    fencing_token: int
    calls: list[Call]
    unknown_ids: list[str] = []
    is_whole_catalogue: bool = False
    redacted_pages: int = 0
    faletl_version: str = ""
    format: int = FORMAT
    fal_started_at: Instant | None = None

    def __post_init__(self) -> None:
        _ = self.window, self.parts  # raises ValueError for what cannot be
        if not _LOAD_ID.fullmatch(self.load_id):
            raise ValueError("a read has another id")

    @property
    def window(self) -> Window:
        """The window that was read."""
        return Window(self.window_start, self.window_end)

    def pages(self, label: str) -> list[LandedPage]:
        """The pages of all calls with that label, in order."""
        return [page for call in self.calls if call.label == label for page in call.pages]

    @property
    def parts(self) -> list[Part]:
        """The parts in which the window was asked for, in order of time."""
        found = self._calls_by_bounds()
        if len(found) > 1:
            found.pop(self.window, None)
        return [Part(window, found[window]) for window in sorted(found)]

    @property
    def whole(self) -> Part | None:
        """Where there are several parts: the whole window, with its control total behind all of them."""
        found = self._calls_by_bounds()
        calls = found.get(self.window) if len(found) > 1 else None
        return Part(self.window, calls) if calls else None

    def _calls_by_bounds(self) -> dict[Window, list[Call]]:
        found: dict[Window, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.bounds or self.window, []).append(call)
        return found

    def of(self, part: Part) -> Manifest:
        """The manifest of the same extract as if it had only that part's calls."""
        return msgspec.structs.replace(self, calls=part.calls)

    @property
    def asked_ids(self) -> frozenset[str]:
        """The endpoint ids that fal answered for."""
        return frozenset(
            endpoint_id
            for call in self.calls
            if call.label == "rows"
            for endpoint_id in call.query.get("endpoint_id", [])
        )

    @property
    def began_at(self) -> datetime:
        """When the extract began: by fal's clock, or by ours where fal did not say."""
        return self.fal_started_at or self.started_at

    @property
    def clock_ahead(self) -> timedelta:
        """How far our clock was ahead of fal's (negative: behind); zero where fal did not say."""
        return self.started_at - self.began_at


class Receipt(msgspec.Struct, frozen=True):
    """What became of an extract in one warehouse: under which token, when, and how it ended.

    `pruned`: it was loaded, and its rows have been deleted since (see faletl/operations/maintain.py).
    An older faletl wrote no id of the warehouse.
    """

    fencing_token: int
    loaded_at: Instant
    outcome: Literal["loaded", "unchanged", "held", "pruned"]
    warehouse_id: str = ""

    @property
    def is_taken_on_trust(self) -> bool:
        """Whether it is loaded again as it was then, though it may be held by today's rules."""
        return not self.warehouse_id


class SealedExtract(msgspec.Struct, frozen=True):
    """A complete read: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def path(self) -> str:
        """Where it is below the landing folder: account, resource, start of the window, id."""
        return "/".join(self.folder.parts[-4:])

    @property
    def ref(self) -> ExtractRef:
        """Its name, for all who need not open it."""
        manifest = self.manifest
        key = WindowKey(manifest.account, manifest.resource, manifest.window)
        times = manifest.started_at, manifest.finished_at
        return ExtractRef(key, manifest.load_id, manifest.run_id, self.path, *times)

    def body(self, page: LandedPage) -> bytes:
        """The page as fal sent it.

        Raises:
            TamperedError: the file is gone, or is not the one that was landed.
            StorageError: the object store does not answer.
        """
        path = self.folder / page.file
        try:
            content = backend_for(path).read(path)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != page.sha256:
            raise DamagedExtractError(
                f"the landed page {path} is not the one that fal sent; restore it, or read the window "
                "again with faletl run --start … --end …",
                file=str(path),
            )
        return _unpacked(content)


class OpenExtract:
    """A read of one window under way: lands pages, then seals them with a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load_id = folder.name
        self.started_at = _started_at(folder.name)
        self.earlier: dict[Path, list[str]] = {}
        """The folders in which pages may have landed before, and what lies in them."""
        self._redacted = 0
        self._locked = ExitStack()
        self._locked.enter_context(backend_for(folder).lock(folder / _LOCK, timeout=0))

    def landed(self, label: str, params: Params) -> Iterator[bytes]:
        """The pages of this very question that an interrupted read left, in order."""
        question = _question(label, params)
        held = {f: sum(n.startswith(question) for n in names) for f, names in self.earlier.items()}
        source = max(held, key=held.__getitem__, default=self.folder)  # of one walk, never of two
        for number in range(1, 1 + held.get(source, 0)):
            name = page_name(label, params, number)
            try:
                content = backend_for(source).read(source / name)
                body = _unpacked(content)
            except (FileNotFoundError, zstandard.ZstdError, MemoryError):  # a size that cannot be
                return  # ask fal from here on
            if source != self.folder:
                write_durably(self.folder / name, content)
            self._redacted += REDACTED.encode() in body
            yield body
            del body, content  # before the next one is read

    def land(self, label: str, params: Params, page: Page) -> LandedPage:
        """Write the page for good; raises StorageError."""
        self._redacted += REDACTED.encode() in page.body
        content = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(page.body)
        name = page_name(label, params, page.number)
        write_durably(self.folder / name, content)
        return _described(name, content, page)

    def keep(self, landed: SealedExtract, part: Part) -> list[Call]:
        """Take over a part of an earlier extract as it is; raises StorageError."""
        for call in part.calls:
            for page in call.pages:
                content = backend_for(self.folder).read(landed.folder / page.file)
                with one_body():
                    self._redacted += REDACTED.encode() in _unpacked(content)
                write_durably(self.folder / page.file, content)
        return part.calls

    def adopt(self, landed: SealedExtract, part: Part) -> list[Call]:
        """Take over the rows of an earlier extract of a part as the `again` walk of this one.

        Raises:
            StorageError: a page cannot be read or written.
        """
        calls = [call for call in part.calls if call.label == "rows"]
        taken = []
        for number, call in enumerate(calls):
            pages = []
            for page in call.pages:
                name = f"again-{number}-{page.file}"
                write_durably(
                    self.folder / name, backend_for(self.folder).read(landed.folder / page.file)
                )
                pages.append(msgspec.structs.replace(page, file=name))
            taken.append(msgspec.structs.replace(call, label="again", pages=pages))
        return taken

    def take_in(self, other: OpenExtract) -> None:
        """Make the pages of another unfinished read ones of this, and let that one go."""
        mine = other.earlier.pop(other.folder, [])
        if pages := [name for name in mine if name.endswith(_PAGE)]:
            Disk.move(other.folder, pages, self.folder)
            self.earlier[self.folder] = backend_for(self.folder).names(self.folder)
        self.earlier |= other.earlier
        if mine:
            other.discard()
        other.close()

    def described(self, label: str, params: Params, page: Page) -> LandedPage:
        """The record of a page that was landed before."""
        name = page_name(label, params, page.number)
        return _described(name, backend_for(self.folder).read(self.folder / name), page)

    def seal(self, manifest: Manifest) -> SealedExtract:
        """Make the read complete: from here on nothing in the folder changes.

        Raises:
            StorageError: the manifest cannot be written, or pages are gone: taken for abandoned, pruned.
        """
        sealed = msgspec.structs.replace(manifest, redacted_pages=self._redacted)
        kept = {page.file for call in sealed.calls for page in call.pages}
        held = set(backend_for(self.folder).names(self.folder))
        if gone := sorted(kept - held):
            raise StorageError(
                f"{self.folder / gone[0]} was deleted while the window was read; try again"
            )
        for name in held - kept - {_LOCK}:  # a batch that was halved, a page of an older question
            backend_for(self.folder).delete(self.folder / name)
        content = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
        write_durably(self.folder / MANIFEST, content)
        self.close()
        return SealedExtract(self.folder, sealed)

    def close(self) -> None:
        """Let go of the folder; without a manifest the next read may take it up."""
        self._locked.close()
        where = backend_for(self.folder)
        if where.has_locks and is_complete(self.folder):
            where.delete(self.folder / _LOCK)

    def discard(self) -> None:
        """Forget the read."""
        with suppress(OSError, StorageError):
            backend_for(self.folder).drop(self.folder)
            if self.earlier.keys() - {self.folder}:  # others' pages are not ours to delete
                backend_for(self.folder).write(self.folder / _DISCARDED, b"")
        self._locked.close()


def root(settings: Settings) -> Path:
    """The landing folder.

    Raises:
        SettingsError: what reads such a URL is not installed.
        StorageError: the object store does not answer, refuses us, or has no such bucket.
    """
    if "://" in settings.landing:
        check_reachable(settings.landing)
    return parse_location(settings.landing)


def new_extract_id(now: datetime) -> str:
    """When the read began, and chance."""
    return f"{now.astimezone(UTC).strftime(_STAMP)}-{secrets.token_hex(3)}"


def begin(settings: Settings, account: str, resource: str, window: Window, now: datetime) -> OpenExtract:
    """Open a new folder for a read of the window; raises StorageError."""
    while True:
        load_id = new_extract_id(now)
        folder = _window_folder(settings, account, resource, window) / load_id
        try:
            backend_for(folder).make(folder)
            return OpenExtract(folder)
        except filelock.Timeout:
            continue  # another run took the folder up before we locked it; it may have it
        except OSError as error:
            raise storage_error(error, folder) from None


def resume(
    settings: Settings, account: str, resource: str, window: Window, since: datetime
) -> OpenExtract | None:
    """The newest unfinished read of the window that began after `since` and that nobody works on.

    One that seems to begin in the future is of a clock that was ahead: nobody knows how old it is.
    """
    parent, now = _window_folder(settings, account, resource, window), datetime.now(UTC)
    for folder in reversed(_load_folders(parent)):
        if _started_at(folder.name) > now + CLOCK_TOLERANCE:
            continue
        if _started_at(folder.name) < since:
            return None
        if is_complete(folder):
            return _once_more(folder)
        if attempt := _taken_up(folder):
            return attempt
        if is_complete(folder):
            return None  # it was finished just now
    return None


def _once_more(folder: Path) -> OpenExtract | None:
    """A new read with the pages of a complete one; None if that was loaded, or refused.

    A run that is killed before it could load leaves such reads: their rows need not be asked for
    again, only whether they are still all.
    """
    earlier = _tries(folder)
    if any({RECEIPT, _DISCARDED} & set(names) for names in earlier.values()):
        return None
    another = _beside(folder)
    try:
        backend_for(another).make(another)
        attempt = OpenExtract(another)
    except filelock.Timeout:
        return None  # another run took the folder up before we locked it; it may have it
    except OSError as error:
        raise storage_error(error, another) from None
    attempt.earlier = earlier
    return attempt


def _tries(folder: Path) -> dict[Path, list[str]]:
    """The folders of all attempts at the read of that folder, and what lies in them."""
    read = _read_of(folder.name)
    found = [one for one in _load_folders(folder.parent) if _read_of(one.name) == read]
    return {one: backend_for(one).names(one) for one in found}


def _beside(folder: Path) -> Path:
    """A folder for another attempt at the same read."""
    return folder.parent / f"{_read_of(folder.name)}-{secrets.token_hex(3)}"


def _taken_up(folder: Path) -> OpenExtract | None:
    """The read of that folder, with the pages that landed; None if it is done or somebody works on it.

    Where nothing can be locked nobody knows whether somebody does. Then whoever is there is left alone:
    the pages of each earlier attempt at this read are taken over into a new folder, as they are needed.
    """
    if not backend_for(folder).has_locks:
        earlier = _tries(folder)
        if any({MANIFEST, _DISCARDED} & set(names) for names in earlier.values()):
            return None
        attempt = OpenExtract(_beside(folder))
        attempt.earlier = earlier
        return attempt
    try:
        attempt = OpenExtract(folder)
    except filelock.Timeout:
        return None
    if is_complete(folder):
        attempt.close()
        return None
    attempt.earlier = _tries(folder)
    return attempt


def open_ahead(
    settings: Settings, account: str, resource: str, window: Window, load_id: str
) -> OpenExtract | None:
    """The unfinished read of that id, made if need be; None if it is done or somebody works on it."""
    folder = _window_folder(settings, account, resource, window) / load_id
    try:
        backend_for(folder).make(folder)
        return _taken_up(folder)
    except OSError as error:
        raise storage_error(error, folder) from None


def gather(
    settings: Settings,
    account: str,
    resource: str,
    window: Window,
    ahead: Sequence[str],
    since: datetime,
) -> OpenExtract | None:
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
) -> SealedExtract | None:
    """The newest complete read of the window by that run; raises TamperedError, as `open_read`."""
    for folder in reversed(_load_folders(_window_folder(settings, account, resource, window))):
        if is_complete(folder):
            landed = open_read(folder)
            if landed.manifest.run_id == run_id and landed.manifest.window == window:
                return landed
    return None


def complete_reads(settings: Settings, day: date | None = None) -> Iterator[Path]:
    """The folder of every complete read (of one UTC day), oldest first within each window."""
    for path in _matching(settings, f"*/*/{day or '*'}/*/{MANIFEST}"):
        if _is_load_id(path.parent.name):
            yield path.parent


def _matching(settings: Settings, pattern: str) -> list[Path]:
    """What has landed under such names; a folder that cannot be listed is an error, never empty."""
    landed = root(settings)
    try:
        return backend_for(landed).matching(landed, pattern)
    except OSError as error:
        raise _unreadable(error, landed) from None


def _unreadable(error: OSError, path: Path) -> StorageError:
    return StorageError(f"cannot read {error.filename or path}: {error.strerror}", file=str(path))


def is_complete(folder: Path) -> bool:
    """Whether the read has its manifest."""
    return backend_for(folder).exists(folder / MANIFEST)


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
    """The first receipt of an extract; None without a whole one; raises StorageError."""
    return _receipt(folder / RECEIPT)


def receipts(folder: Path) -> list[Receipt]:
    """The receipts of an extract, one for each warehouse that took it; raises StorageError."""
    names = filter(_RECEIPT_FILE.fullmatch, sorted(backend_for(folder).names(folder)))
    return [receipt for name in names if (receipt := _receipt(folder / name))]


def _receipt(path: Path) -> Receipt | None:
    try:
        return msgspec.json.decode(backend_for(path).read(path), type=Receipt)
    except (FileNotFoundError, *UNREADABLE):
        return None
    except OSError as error:
        raise _unreadable(error, path) from None


def refuse(folder: Path) -> None:
    """Write down that the rows of a complete read are not to be taken over; raises StorageError."""
    write_durably(folder / _DISCARDED, b"")


def leave_receipt(folder: Path, receipt: Receipt) -> None:
    """Write down what became of the extract in a warehouse; raises StorageError.

    A receipt stays as it is, unless a held extract is loaded after all, or rows that were loaded are
    deleted. Where several warehouses share the landing folder, each later one has a file of its own.
    """
    path, known = folder / RECEIPT, receipt_of(folder)
    if known is not None and known.warehouse_id != receipt.warehouse_id:
        path = folder / f"loaded-{receipt.warehouse_id}.json"
        known = _receipt(path)
    is_later = known is not None and (
        (known.outcome == "held" and receipt.outcome != "held")
        or (known.outcome != "pruned" and receipt.outcome == "pruned")
    )
    if known is None or is_later:
        write_durably(path, msgspec.json.encode(receipt))


def take_receipts(folder: Path) -> None:
    """Forget that the extract was loaded: another one stands in for it."""
    for name in filter(_RECEIPT_FILE.fullmatch, backend_for(folder).names(folder)):
        backend_for(folder).delete(folder / name)


def open_read(folder: Path) -> SealedExtract:
    """The complete read in that folder.

    Raises:
        TamperedError: its manifest is gone, or not one of ours.
        UsageError: it was landed by a newer faletl.
        StorageError: the disk refuses, or the object store does not answer.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(backend_for(path).read(path), type=Manifest)
    except (FileNotFoundError, IsADirectoryError, *UNREADABLE) as error:
        reason = "it is gone" if isinstance(error, OSError) else str(error)
        raise DamagedExtractError(
            f"{path} cannot be read: {reason}; restore it, or read the window again with faletl run "
            "--start … --end …",
            file=str(path),
        ) from None
    except OSError as error:
        raise _unreadable(error, path) from None
    if manifest.format > FORMAT or manifest.resource not in RESOURCES:
        raise UsageError(f"{path} was landed by faletl {manifest.faletl_version}; upgrade faletl")
    return SealedExtract(folder, manifest)


def all_reads(settings: Settings) -> Iterator[Path]:
    """The folder of every read, complete or not."""
    for folder in _matching(settings, "*/*/*/*"):
        if _is_load_id(folder.name) and backend_for(folder).is_own_folder(folder):
            yield folder


def interrupted_reads(settings: Settings, before: datetime) -> Iterator[Path]:
    """The folder of every read that began before then, is not complete, and is nobody's at work.

    Where nothing can be locked, it is taken for nobody's a day later; its writer could not seal it then.
    """
    complete = set(complete_reads(settings))  # of an object store a listing, not a question for each
    for folder in all_reads(settings):
        if folder in complete or _started_at(folder.name) >= before - backend_for(folder).grace:
            continue
        try:
            OpenExtract(folder).close()
        except filelock.Timeout:
            continue
        if not is_complete(folder):
            yield folder


def drop(folder: Path) -> None:
    """Delete a read; the manifest first, so that what a kill leaves of it is no complete read.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        if backend_for(folder).is_own_folder(folder):
            with suppress(IsADirectoryError):  # no manifest of ours
                backend_for(folder).delete(folder / MANIFEST)
        backend_for(folder).drop(folder)
        backend_for(folder).drop_empty(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from None


def size(folder: Path) -> int:
    """The bytes of the files of a read; of one under way, about."""
    return sum(sizes(folder))


def sizes(folder: Path) -> list[int]:
    """The bytes of each file of a read; of one under way, about."""
    return backend_for(folder).sizes(folder)


@contextmanager
def deleting(settings: Settings) -> Iterator[None]:
    """Hold the landing folder against others that delete extracts in it, or need all of them.

    In an object store nothing can be held; there deleting twice does no harm.

    Raises:
        WarehouseBusyError: somebody held it for as long as FALETL_LOCK_SECONDS says.
    """
    folder = root(settings)
    with ExitStack() as held:
        try:
            if backend_for(folder).exists(folder):  # taking the lock would make it
                held.enter_context(backend_for(folder).lock(folder / _DELETING, settings.lock_seconds))
        except filelock.Timeout:
            raise WarehouseBusyError(
                f"another faletl maintain, landing prune or rebuild works in {folder}; waited "
                f"{settings.lock_seconds:.0f} s, try again later"
            ) from None
        except OSError:
            pass  # who may not write there deletes nothing either, and may rebuild all the same
        yield


def unfinished_files(settings: Settings) -> Iterator[Path]:
    """Files that writers left which were killed before they could name them."""
    for folder in (*all_reads(settings), *(root(settings) / name for name in (DECISIONS, PLANS))):
        yield from backend_for(folder).unfinished(folder)


def page_name(label: str, params: Params, number: int) -> str:
    """The file of a page: nothing that fal sent is part of it, the question only as a digest."""
    return f"{_question(label, params)}{number:05d}{_PAGE}"


def _question(label: str, params: Params) -> str:
    question = msgspec.json.encode(dict(sorted(params.items())))
    return f"{label}-{hashlib.sha256(question).hexdigest()[:12]}-"


def _unpacked(content: bytes) -> bytes:
    """The page that a file holds; a large one waits for its turn."""
    take_turn(zstandard.frame_content_size(content))
    return zstandard.ZstdDecompressor().decompress(content)


def _described(name: str, content: bytes, page: Page) -> LandedPage:
    digest = hashlib.sha256(content).hexdigest()
    return LandedPage(name, page.rows, len(content), digest, page.request_id)


def _window_folder(settings: Settings, account: str, resource: str, window: Window) -> Path:
    # A day has a folder for all its reads; snapshots of a day lie side by side.
    return root(settings) / _slug(account) / resource / window.day.isoformat()


def _load_folders(parent: Path) -> list[Path]:
    """The folders of reads in there, oldest first."""
    return [parent / name for name in sorted(backend_for(parent).names(parent)) if _is_load_id(name)]


def _is_load_id(name: str) -> bool:
    """Whether a folder of that name is ours: what others put there stays as it is."""
    with suppress(ValueError):
        return bool(_LOAD_ID.fullmatch(name) and _started_at(name))
    return False


def _read_of(load_id: str) -> str:
    """The id without what tells attempts at the same read apart."""
    found = _LOAD_ID.fullmatch(load_id)
    return found["read"] if found else load_id


def started_at(folder: Path) -> datetime:
    """When the read of that folder began, by the clock of its machine."""
    return _started_at(folder.name)


def _started_at(load_id: str) -> datetime:
    return datetime.strptime(load_id.split("-")[0], _STAMP).replace(tzinfo=UTC)


def _slug(label: str) -> str:
    """A folder name for any account label; labels that differ never share one."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", label):
        return label
    readable = re.sub(r"[^a-z0-9_-]+", "-", label.lower()).strip("-")[:40]
    return f"{readable or 'account'}.{hashlib.sha256(label.encode()).hexdigest()[:12]}"
