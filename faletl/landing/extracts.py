"""Landing: pages as fal sent them, with a sealed manifest. Alone knows landing paths.

    <landing>/<account>/<resource>/<window start>/<extract id>/<call>-<page>.json.zst
                                                              /manifest.json
                                                              /loaded.json (loaded-<warehouse>.json)

An extract of a window lands in a folder of its own, which never changes once it has a manifest. A page
with its final name is complete (storage.py). An extract without a manifest is unfinished, but it can be
resumed: in its own folder, where folders can be locked; elsewhere in another folder, with its id and
more random bits, so that two runs never write to the same folder. A sealed extract that a killed run did
not load can be resumed in the same way. A loaded extract has a receipt next to its pages, so that the
history of the warehouse is kept with them.
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
"""The folder of people's decisions (faletl/landing/decisions.py)."""
PLANS = ".plans"
"""The folder of plans (faletl/line/distributed.py)."""
_LOCK = ".reading"
_DELETING = ".deleting"
_DISCARDED = "discarded"
_PAGE = ".json.zst"
_STAMP = "%Y%m%dT%H%M%S%fZ"
_EXTRACT_ID = re.compile(r"(?P<base>\d{8}T\d{12}Z-[0-9a-f]{6})(-[0-9a-f]{6})?", re.ASCII)
_RECEIPT_FILE = re.compile(r"loaded(-[0-9a-f]+)?\.json")
_PAGE_FILE = re.compile(r"[a-z0-9-]{1,100}" + re.escape(_PAGE))

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""An instant with a time zone, so that it can be compared."""


class LandedPage(msgspec.Struct, frozen=True):
    """One page on disk. `bytes` and `sha256` are those of its file."""

    file: str
    rows: int
    bytes: int
    sha256: str
    request_id: str | None = None

    def __post_init__(self) -> None:
        if not _PAGE_FILE.fullmatch(self.file):
            raise ValueError("this is not the name of a page")


class Call(msgspec.Struct, frozen=True):
    """One walk: the question (never the key) and the pages that answered it, in order.

    `label` is `rows` for the records, `proof` for fal's control total after them, `before` for the total
    before records of several pages, `again` for a second walk of the records: one that replaces a
    control total that fal refused, or the walk of the extract before.
    """

    label: str
    path: str
    query: dict[str, list[str]]
    pages: list[LandedPage]

    @property
    def bounds(self) -> Window | None:
        """The window, or the part of it, that was requested; None for a question without bounds."""
        if not {"start", "end"} <= self.query.keys():
            return None
        (start,), (end,) = self.query["start"], self.query["end"]
        return Window(datetime.fromisoformat(start), datetime.fromisoformat(end))


class Part(msgspec.Struct, frozen=True):
    """A part of a window that was requested separately, and the calls that answered it.

    Most windows are a single part. A window whose pages do not add up is requested again in halves.
    """

    window: Window
    calls: list[Call]

    def has(self, label: str) -> bool:
        """Whether the part has a walk with this label; the walk may have no rows."""
        return any(call.label == label for call in self.calls)

    @property
    def pages(self) -> int:
        """The number of pages with its rows."""
        return sum(len(call.pages) for call in self.calls if call.label == "rows")


class Manifest(msgspec.Struct, frozen=True):
    """The contents of a sealed extract.

    `load_id` is the id of the extract. `planned_from` is the first day of this resource that the run
    planned. `fencing_token` is the newest token that was known at planning: rows that were loaded under
    a greater token may be newer than this extract. `is_whole_catalogue`: all of fal's endpoints were
    asked for. `fal_started_at` is the time of the first answer by fal's clock; None where fal did not
    send it, and in manifests of an older faletl.
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
        _ = self.window, self.parts  # raises ValueError for bounds that are not valid
        if not _EXTRACT_ID.fullmatch(self.load_id):
            raise ValueError("this is not the id of an extract")

    @property
    def window(self) -> Window:
        """The window of the extract."""
        return Window(self.window_start, self.window_end)

    def pages(self, label: str) -> list[LandedPage]:
        """Return the pages of all calls with this label, in order."""
        return [page for call in self.calls if call.label == label for page in call.pages]

    @property
    def parts(self) -> list[Part]:
        """The parts in which the window was requested, in order of time."""
        calls = self._calls_by_bounds()
        if len(calls) > 1:
            calls.pop(self.window, None)
        return [Part(window, calls[window]) for window in sorted(calls)]

    @property
    def whole(self) -> Part | None:
        """The whole window with its control total after several parts; None where there is one part."""
        by_bounds = self._calls_by_bounds()
        calls = by_bounds.get(self.window) if len(by_bounds) > 1 else None
        return Part(self.window, calls) if calls else None

    def _calls_by_bounds(self) -> dict[Window, list[Call]]:
        by_bounds: dict[Window, list[Call]] = {}
        for call in self.calls:
            by_bounds.setdefault(call.bounds or self.window, []).append(call)
        return by_bounds

    def of(self, part: Part) -> Manifest:
        """Return the manifest of this extract with the calls of one part alone."""
        return msgspec.structs.replace(self, calls=part.calls)

    @property
    def asked_ids(self) -> frozenset[str]:
        """The endpoint ids for which fal gave an answer."""
        return frozenset(
            endpoint_id
            for call in self.calls
            if call.label == "rows"
            for endpoint_id in call.query.get("endpoint_id", [])
        )

    @property
    def began_at(self) -> datetime:
        """The start of the extract by fal's clock, or by ours where fal did not send its time."""
        return self.fal_started_at or self.started_at

    @property
    def clock_ahead(self) -> timedelta:
        """How far our clock was ahead of fal's (negative: behind); zero where fal sent no time."""
        return self.started_at - self.began_at


class Receipt(msgspec.Struct, frozen=True):
    """The outcome of an extract in one warehouse, with the fencing token and the time of the load.

    `pruned`: it was loaded, and its rows have been deleted since (see faletl/operations/maintain.py).
    Receipts of an older faletl have no id of the warehouse.
    """

    fencing_token: int
    loaded_at: Instant
    outcome: Literal["loaded", "unchanged", "held", "pruned"]
    warehouse_id: str = ""

    @property
    def is_taken_on_trust(self) -> bool:
        """Whether `rebuild` loads it as it was loaded then, even if today's rules would hold it."""
        return not self.warehouse_id


class SealedExtract(msgspec.Struct, frozen=True):
    """A sealed extract: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def path(self) -> str:
        """Its path below the landing folder: account, resource, start of the window, id."""
        return "/".join(self.folder.parts[-4:])

    @property
    def ref(self) -> ExtractRef:
        """Its name, for code that does not open it."""
        manifest = self.manifest
        key = WindowKey(manifest.account, manifest.resource, manifest.window)
        times = manifest.started_at, manifest.finished_at
        return ExtractRef(key, manifest.load_id, manifest.run_id, self.path, *times)

    def body(self, page: LandedPage) -> bytes:
        """Return the page as fal sent it.

        Raises:
            TamperedError: the file is gone, or has changed since it landed.
            StorageError: the object store does not answer.
        """
        path = self.folder / page.file
        try:
            content = backend_for(path).read(path)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != page.sha256:
            raise DamagedExtractError(
                f"the landed page {path} is not the one that fal sent; restore it, or fetch the window "
                "again with faletl run --start … --end …",
                file=str(path),
            )
        return _unpacked(content)


class OpenExtract:
    """An unfinished extract of one window: it lands pages, then seals them with a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.load_id = folder.name
        self.started_at = _started_at(folder.name)
        self.earlier: dict[Path, list[str]] = {}
        """The folders in which pages may have landed before, with the names of their files."""
        self._redacted = 0
        self._locked = ExitStack()
        self._locked.enter_context(backend_for(folder).lock(folder / _LOCK, timeout=0))

    def resumable_pages(self, label: str, params: Params) -> Iterator[bytes]:
        """Yield the pages of the same question that an interrupted extract left, in order."""
        prefix = _question(label, params)
        counts = {f: sum(n.startswith(prefix) for n in names) for f, names in self.earlier.items()}
        source = max(counts, key=counts.__getitem__, default=self.folder)  # all from one walk
        for number in range(1, 1 + counts.get(source, 0)):
            name = page_name(label, params, number)
            try:
                content = backend_for(source).read(source / name)
                body = _unpacked(content)
            except (FileNotFoundError, zstandard.ZstdError, MemoryError):  # an absurd size
                return  # ask fal from here on
            if source != self.folder:
                write_durably(self.folder / name, content)
            self._redacted += REDACTED.encode() in body
            yield body
            del body, content  # before the next page is opened

    def land(self, label: str, params: Params, page: Page) -> LandedPage:
        """Write the page durably; raises StorageError."""
        self._redacted += REDACTED.encode() in page.body
        content = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(page.body)
        name = page_name(label, params, page.number)
        write_durably(self.folder / name, content)
        return _landed_page(name, content, page)

    def keep(self, landed: SealedExtract, part: Part) -> list[Call]:
        """Copy a part of an earlier extract unchanged; raises StorageError."""
        for call in part.calls:
            for page in call.pages:
                content = backend_for(self.folder).read(landed.folder / page.file)
                with one_body():
                    self._redacted += REDACTED.encode() in _unpacked(content)
                write_durably(self.folder / page.file, content)
        return part.calls

    def copy_rows_of(self, landed: SealedExtract, part: Part) -> list[Call]:
        """Copy the rows of a part of an earlier extract as the `again` walk of this one.

        Raises:
            StorageError: a page cannot be read or written.
        """
        calls = [call for call in part.calls if call.label == "rows"]
        copies = []
        for number, call in enumerate(calls):
            pages = []
            for page in call.pages:
                name = f"again-{number}-{page.file}"
                write_durably(
                    self.folder / name, backend_for(self.folder).read(landed.folder / page.file)
                )
                pages.append(msgspec.structs.replace(page, file=name))
            copies.append(msgspec.structs.replace(call, label="again", pages=pages))
        return copies

    def take_in(self, other: OpenExtract) -> None:
        """Move the pages of another unfinished extract to this one, and discard the other."""
        names = other.earlier.pop(other.folder, [])
        if pages := [name for name in names if name.endswith(_PAGE)]:
            Disk.move(other.folder, pages, self.folder)
            self.earlier[self.folder] = backend_for(self.folder).names(self.folder)
        self.earlier |= other.earlier
        if names:
            other.discard()
        other.close()

    def describe_existing(self, label: str, params: Params, page: Page) -> LandedPage:
        """Return the manifest's entry for a page that landed before."""
        name = page_name(label, params, page.number)
        return _landed_page(name, backend_for(self.folder).read(self.folder / name), page)

    def seal(self, manifest: Manifest) -> SealedExtract:
        """Write the manifest: from now on nothing in the folder changes.

        Raises:
            StorageError: the manifest cannot be written, or pages were pruned as abandoned.
        """
        sealed = msgspec.structs.replace(manifest, redacted_pages=self._redacted)
        needed = {page.file for call in sealed.calls for page in call.pages}
        present = set(backend_for(self.folder).names(self.folder))
        if gone := sorted(needed - present):
            raise StorageError(
                f"{self.folder / gone[0]} was deleted while the window was fetched; try again"
            )
        for name in present - needed - {_LOCK}:  # of a batch that was halved, or of an older question
            backend_for(self.folder).delete(self.folder / name)
        content = msgspec.json.format(msgspec.json.encode(sealed), indent=1)
        write_durably(self.folder / MANIFEST, content)
        self.close()
        return SealedExtract(self.folder, sealed)

    def close(self) -> None:
        """Unlock the folder; without a manifest, the next run may resume the extract."""
        self._locked.close()
        where = backend_for(self.folder)
        if where.has_locks and is_complete(self.folder):
            where.delete(self.folder / _LOCK)

    def discard(self) -> None:
        """Delete the extract, and mark its earlier pages as discarded."""
        with suppress(OSError, StorageError):
            backend_for(self.folder).drop(self.folder)
            if self.earlier.keys() - {self.folder}:  # others' pages are not ours to delete
                backend_for(self.folder).write(self.folder / _DISCARDED, b"")
        self._locked.close()


def root(settings: Settings) -> Path:
    """Return the landing folder.

    Raises:
        SettingsError: the library for this kind of URL is not installed.
        StorageError: the object store does not answer, refuses us, or has no such bucket.
    """
    if "://" in settings.landing:
        check_reachable(settings.landing)
    return parse_location(settings.landing)


def new_extract_id(now: datetime) -> str:
    """Return a sortable id: UTC start time plus 24 random bits."""
    return f"{now.astimezone(UTC).strftime(_STAMP)}-{secrets.token_hex(3)}"


def begin(settings: Settings, account: str, resource: str, window: Window, now: datetime) -> OpenExtract:
    """Start an extract of the window in a new folder; raises StorageError."""
    while True:
        folder = _window_folder(settings, account, resource, window) / new_extract_id(now)
        try:
            backend_for(folder).make(folder)
            return OpenExtract(folder)
        except filelock.Timeout:
            continue  # another run locked the folder before us, and keeps it
        except OSError as error:
            raise storage_error(error, folder) from None


def resume(
    settings: Settings, account: str, resource: str, window: Window, since: datetime
) -> OpenExtract | None:
    """Return the newest extract of the window to resume: started after `since`, and not locked.

    An extract that starts in the future is from a clock that was ahead. Its age is unknown, so it is
    not resumed.
    """
    parent, now = _window_folder(settings, account, resource, window), datetime.now(UTC)
    for folder in reversed(_extract_folders(parent)):
        if _started_at(folder.name) > now + CLOCK_TOLERANCE:
            continue
        if _started_at(folder.name) < since:
            return None
        if is_complete(folder):
            return _copied(folder)
        if attempt := _resumed(folder):
            return attempt
        if is_complete(folder):
            return None  # another run has just finished it
    return None


def _copied(folder: Path) -> OpenExtract | None:
    """Return a new extract with the pages of a sealed one; None if that was loaded, or refused.

    A run that is killed before it loads leaves such extracts. Their rows are not fetched again, only
    the control total that shows whether they are still complete.
    """
    earlier = _tries(folder)
    if any({RECEIPT, _DISCARDED} & set(names) for names in earlier.values()):
        return None
    new_folder = _folder_next_to(folder)
    try:
        backend_for(new_folder).make(new_folder)
        attempt = OpenExtract(new_folder)
    except filelock.Timeout:
        return None  # another run locked the folder before us, and keeps it
    except OSError as error:
        raise storage_error(error, new_folder) from None
    attempt.earlier = earlier
    return attempt


def _tries(folder: Path) -> dict[Path, list[str]]:
    """Return the folders of all tries of the extract in this folder, with the names of their files."""
    base_id = _base_id(folder.name)
    tries = [path for path in _extract_folders(folder.parent) if _base_id(path.name) == base_id]
    return {path: backend_for(path).names(path) for path in tries}


def _folder_next_to(folder: Path) -> Path:
    """Return a folder for another try of the same extract."""
    return folder.parent / f"{_base_id(folder.name)}-{secrets.token_hex(3)}"


def _resumed(folder: Path) -> OpenExtract | None:
    """Return the extract in this folder with its landed pages; None if it is done, or locked.

    Where nothing can be locked, another run may still write to the folder, so it is left alone: the
    pages of each earlier try of this extract are copied to a new folder, as they are needed.
    """
    if not backend_for(folder).has_locks:
        earlier = _tries(folder)
        if any({MANIFEST, _DISCARDED} & set(names) for names in earlier.values()):
            return None
        attempt = OpenExtract(_folder_next_to(folder))
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
    """Return the unfinished extract with this id, made if needed; None if it is done, or locked."""
    folder = _window_folder(settings, account, resource, window) / load_id
    try:
        backend_for(folder).make(folder)
        return _resumed(folder)
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
    """Return one extract with the pages of all those fetched ahead; None if they are too old, or locked.

    Its start is that of the first of them: none of its pages is older.
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
    """Return the newest sealed extract of the window by a run; raises TamperedError, as `open_read`."""
    for folder in reversed(_extract_folders(_window_folder(settings, account, resource, window))):
        if is_complete(folder):
            landed = open_read(folder)
            if landed.manifest.run_id == run_id and landed.manifest.window == window:
                return landed
    return None


def complete_reads(settings: Settings, day: date | None = None) -> Iterator[Path]:
    """Yield the folder of every sealed extract (of one UTC day), oldest first within each window."""
    for path in _matching(settings, f"*/*/{day or '*'}/*/{MANIFEST}"):
        if _is_extract_id(path.parent.name):
            yield path.parent


def _matching(settings: Settings, pattern: str) -> list[Path]:
    """Return the landed paths that match; a folder that cannot be listed is an error, never empty."""
    folder = root(settings)
    try:
        return backend_for(folder).matching(folder, pattern)
    except OSError as error:
        raise _unreadable(error, folder) from None


def _unreadable(error: OSError, path: Path) -> StorageError:
    return StorageError(f"cannot read {error.filename or path}: {error.strerror}", file=str(path))


def is_complete(folder: Path) -> bool:
    """Whether the extract has its manifest."""
    return backend_for(folder).exists(folder / MANIFEST)


def is_intact(folder: Path) -> bool:
    """Whether a sealed extract is still there, byte for byte."""
    try:
        landed = open_read(folder)
        for call in landed.manifest.calls:
            for page in call.pages:
                landed.body(page)
    except TamperedError:
        return False
    return True


def receipt_of(folder: Path) -> Receipt | None:
    """Return the first receipt of an extract; None if it has no valid one; raises StorageError."""
    return _receipt(folder / RECEIPT)


def receipts(folder: Path) -> list[Receipt]:
    """Return the receipts of an extract, one for each warehouse; raises StorageError."""
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
    """Mark a sealed extract, so that no other extract copies its rows; raises StorageError."""
    write_durably(folder / _DISCARDED, b"")


def leave_receipt(folder: Path, receipt: Receipt) -> None:
    """Write the outcome of the extract in a warehouse; raises StorageError.

    A receipt stays unchanged, unless a held extract is loaded after all, or its loaded rows are deleted.
    Where several warehouses share the landing folder, each one after the first has a file of its own.
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
    """Delete the receipts of an extract that another extract has replaced."""
    for name in filter(_RECEIPT_FILE.fullmatch, backend_for(folder).names(folder)):
        backend_for(folder).delete(folder / name)


def open_read(folder: Path) -> SealedExtract:
    """Return the sealed extract in this folder.

    Raises:
        TamperedError: its manifest is gone, or not valid.
        UsageError: a newer faletl landed it.
        StorageError: the disk or the object store fails.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(backend_for(path).read(path), type=Manifest)
    except (FileNotFoundError, IsADirectoryError, *UNREADABLE) as error:
        reason = "it is gone" if isinstance(error, FileNotFoundError) else str(error)
        raise DamagedExtractError(
            f"{path} cannot be read: {reason}; restore it, or fetch the window again with faletl run "
            "--start … --end …",
            file=str(path),
        ) from None
    except OSError as error:
        raise _unreadable(error, path) from None
    if manifest.format > FORMAT or manifest.resource not in RESOURCES:
        raise UsageError(f"{path} was landed by faletl {manifest.faletl_version}; upgrade faletl")
    return SealedExtract(folder, manifest)


def all_reads(settings: Settings) -> Iterator[Path]:
    """Yield the folder of every extract, sealed or not."""
    for folder in _matching(settings, "*/*/*/*"):
        if _is_extract_id(folder.name) and backend_for(folder).is_own_folder(folder):
            yield folder


def interrupted_reads(settings: Settings, before: datetime) -> Iterator[Path]:
    """Yield the folders of abandoned extracts: started before `before`, not sealed, not locked.

    Where nothing can be locked, an extract counts as abandoned a day later, when it can no longer be
    sealed.
    """
    complete = set(complete_reads(settings))  # one listing, not a request for each
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
    """Delete an extract; the manifest first, so that a kill never leaves a sealed extract with gaps.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        if backend_for(folder).is_own_folder(folder):
            with suppress(IsADirectoryError):  # not a manifest of faletl
                backend_for(folder).delete(folder / MANIFEST)
        backend_for(folder).drop(folder)
        backend_for(folder).drop_empty(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from None


def size(folder: Path) -> int:
    """Return the size of an extract in bytes; approximate while it is being written."""
    return sum(sizes(folder))


def sizes(folder: Path) -> list[int]:
    """Return the bytes of each file of an extract; approximate while it is being written."""
    return backend_for(folder).sizes(folder)


@contextmanager
def deleting(settings: Settings) -> Iterator[None]:
    """Lock the landing folder against commands that delete extracts in it, or need all of them.

    In an object store nothing can be locked; there deleting twice does no harm.

    Raises:
        WarehouseBusyError: another command kept the lock for FALETL_LOCK_SECONDS.
    """
    folder = root(settings)
    with ExitStack() as stack:
        try:
            if backend_for(folder).exists(folder):  # the lock would create it
                stack.enter_context(backend_for(folder).lock(folder / _DELETING, settings.lock_seconds))
        except filelock.Timeout:
            raise WarehouseBusyError(
                f"another faletl maintain, landing prune or rebuild is using {folder}; waited "
                f"{settings.lock_seconds:.0f} s, try again later"
            ) from None
        except OSError:
            pass  # without permission to write, nothing is deleted; rebuild still works
        yield


def unfinished_files(settings: Settings) -> Iterator[Path]:
    """Yield files of writers that were killed before they gave them their final names."""
    for folder in (*all_reads(settings), *(root(settings) / name for name in (DECISIONS, PLANS))):
        yield from backend_for(folder).unfinished(folder)


def page_name(label: str, params: Params, number: int) -> str:
    """Return the file name of a page: free of anything fal sent; the question is in it as a digest."""
    return f"{_question(label, params)}{number:05d}{_PAGE}"


def _question(label: str, params: Params) -> str:
    question = msgspec.json.encode(dict(sorted(params.items())))
    return f"{label}-{hashlib.sha256(question).hexdigest()[:12]}-"


def _unpacked(content: bytes) -> bytes:
    """Return the page in a file; a large page waits for its turn."""
    take_turn(zstandard.frame_content_size(content))
    return zstandard.ZstdDecompressor().decompress(content)


def _landed_page(name: str, content: bytes, page: Page) -> LandedPage:
    digest = hashlib.sha256(content).hexdigest()
    return LandedPage(name, page.rows, len(content), digest, page.request_id)


def _window_folder(settings: Settings, account: str, resource: str, window: Window) -> Path:
    # All extracts of a day are in one folder, and so are all snapshots of a day.
    return root(settings) / _slug(account) / resource / window.day.isoformat()


def _extract_folders(parent: Path) -> list[Path]:
    """Return the folders of extracts in `parent`, oldest first."""
    return [parent / name for name in sorted(backend_for(parent).names(parent)) if _is_extract_id(name)]


def _is_extract_id(name: str) -> bool:
    """Return whether a folder of that name is an extract; folders of other programs are left alone."""
    with suppress(ValueError):
        return bool(_EXTRACT_ID.fullmatch(name) and _started_at(name))
    return False


def _base_id(extract_id: str) -> str:
    """Return the id without the part that differs between tries of the same extract."""
    match = _EXTRACT_ID.fullmatch(extract_id)
    return match["base"] if match else extract_id


def started_at(folder: Path) -> datetime:
    """Return the start of the extract in this folder, by the clock of its machine."""
    return _started_at(folder.name)


def _started_at(extract_id: str) -> datetime:
    return datetime.strptime(extract_id.split("-")[0], _STAMP).replace(tzinfo=UTC)


def _slug(label: str) -> str:
    """Return a folder name for any account label; different labels never share one."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", label):
        return label
    readable = re.sub(r"[^a-z0-9_-]+", "-", label.lower()).strip("-")[:40]
    return f"{readable or 'account'}.{hashlib.sha256(label.encode()).hexdigest()[:12]}"
