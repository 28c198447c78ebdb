"""Handover: loaded days as typed Parquet files, for engines that take these from a folder.

    <out>/<resource>/account=<account>/day=<UTC day>/rows.parquet
    <out>/manifest.json

A file holds the rows of a day as the raw table has them. A day that was loaded again gets a new file in
one step, so that whoever reads all files has each day once, at any moment. The manifest lists the files
with their rows, cost and a digest of what they hold. Of a label that was renamed or forgotten, the files
of these days are deleted: what they held is in others now, or nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date
from pathlib import Path
from urllib.parse import quote

import msgspec
import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings
from faletl.errors import StorageError
from faletl.files import scratch_folder
from faletl.landing import decisions
from faletl.landing.decisions import AccountForgotten, AccountRenamed
from faletl.line.report import Progress, silent
from faletl.resources import RESOURCES
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import current_loads, rows_of_windows
from faletl.warehouse.protocol import Warehouse
from faletl.windows import Window
from faletl.wire import UNREADABLE

FILE, MANIFEST = "rows.parquet", "manifest.json"


@dataclass(slots=True)
class Handed:
    """The files that were written, how many were there already, and those that were deleted."""

    written: list[Path] = field(default_factory=list)
    unchanged: int = 0
    deleted: list[Path] = field(default_factory=list)


class Day(msgspec.Struct, frozen=True):
    """A file of the manifest; `cost_total` is exact, and null where rows have no cost."""

    path: str
    resource: str
    account: str
    day: date
    rows: int
    cost_total: str | None
    digest: str


class _Manifest(msgspec.Struct):
    files: list[Day]


def hand_over(
    settings: Settings, out: Path, asked: Asked = EVERYTHING_DUE, progress: Progress = silent
) -> Handed:
    """Make the folder hold the loaded days of the resources asked for (default: all).

    Raises:
        UsageError: there is no warehouse yet.
        StorageError: the folder cannot be written, or the landing folder cannot be read.
    """
    warehouse, handed = open_warehouse(settings), Handed()
    by_folder: dict[Path, list[sa.RowMapping]] = {}
    for load in current_loads(warehouse, asked):
        by_folder.setdefault(_folder(out, load), []).append(load)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that a finished file is renamed into its place.
        with scratch_folder(out) as scratch:
            listed = _listed(out)
            try:
                for done, (folder, loads) in enumerate(by_folder.items()):
                    progress("handing over", done, len(by_folder))
                    _fill(warehouse, out, folder, loads, listed, handed, scratch, settings.memory)
                for label in _ended_labels(settings):
                    for folder in _folders_of(out, label, asked):
                        if folder not in by_folder:
                            _empty(out, folder, listed, handed)
            finally:
                _list(out, listed, scratch)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror}") from None
    progress("handing over", len(by_folder), len(by_folder))
    return handed


def _folder(out: Path, load: sa.RowMapping) -> Path:
    day = load["window_start"].astimezone(UTC).date()
    return out / str(load["resource"]) / _of_account(load["account"]) / f"day={day}"


def _of_account(label: str) -> str:
    return f"account={quote(label, safe='')}"


def _fill(
    warehouse: Warehouse,
    out: Path,
    folder: Path,
    loads: Sequence[sa.RowMapping],
    listed: dict[str, Day],
    handed: Handed,
    scratch: Path,
    memory: str,
) -> None:
    """Write the day's file elsewhere and rename it into its place, unless it is there already."""
    path = folder / FILE
    name = path.relative_to(out).as_posix()
    held = "\n".join(sorted(f"{load['load_id']} {load['digest']}" for load in loads))
    digest = hashlib.sha256(held.encode()).hexdigest()
    if name in listed and listed[name].digest == digest and path.exists():
        handed.unchanged += 1
        return
    resource, account = RESOURCES[loads[0]["resource"]], loads[0]["account"]
    windows = [Window(load["window_start"], load["window_end"]) for load in loads]
    part = scratch / FILE
    with warehouse.reading() as connection:
        if connection is None:
            return
        warehouse.hand_out(connection, rows_of_windows(resource, account, windows), part)
    rows, cost_total = _figures(part, memory)
    folder.mkdir(parents=True, exist_ok=True)
    for older in folder.glob("*.parquet"):
        if older != path:  # as an older faletl named it
            older.replace(path)
    part.replace(path)
    handed.written.append(path)
    listed[name] = Day(name, resource.name, account, windows[0].day, rows, cost_total, digest)


def _figures(path: Path, memory: str) -> tuple[int, str | None]:
    with duck.room_to_spill() as scratch, duck.engine(memory, scratch) as engine:
        rows = engine.from_parquet(str(path))
        cost = "sum(cost_total)::varchar" if "cost_total" in rows.columns else "null"
        found = rows.aggregate(f"count(*), {cost}").fetchone()
    return (int(found[0]), found[1]) if found else (0, None)


def _empty(out: Path, folder: Path, listed: dict[str, Day], handed: Handed) -> None:
    for old in folder.glob("*.parquet"):
        old.unlink()
        handed.deleted.append(old)
        listed.pop(old.relative_to(out).as_posix(), None)
    with suppress(OSError):  # somebody put something else there
        folder.rmdir()


def _folders_of(out: Path, label: str, asked: Asked) -> Iterator[Path]:
    """The folders of the label's days that are asked for."""
    for folder in sorted(out.glob(f"*/{_of_account(label)}/day=*")):
        day = date.fromisoformat(folder.name.removeprefix("day="))
        if asked.includes(folder.parents[1].name, Window.of_day(day)):
            yield folder


def _ended_labels(settings: Settings) -> set[str]:
    """The labels that people renamed or forgot once; one may be that of another account now.

    Folders of labels that nobody ever decided about stay: another warehouse may hand over to `out`, too.
    """
    return {
        one.account
        for one in decisions.recorded(settings)
        if isinstance(one, AccountRenamed | AccountForgotten)
    }


# --- The manifest ---------------------------------------------------------------------------------


def _listed(out: Path) -> dict[str, Day]:
    """What the manifest lists, by path. Without a readable one every file is written again."""
    try:
        content = (out / MANIFEST).read_bytes()
        return {one.path: one for one in msgspec.json.decode(content, type=_Manifest).files}
    except (FileNotFoundError, *UNREADABLE):
        return {}


def _list(out: Path, listed: dict[str, Day], scratch: Path) -> None:
    files = _Manifest([listed[path] for path in sorted(listed)])
    part = scratch / MANIFEST
    part.write_bytes(msgspec.json.format(msgspec.json.encode(files), indent=1))
    part.replace(out / MANIFEST)
