"""Handover: write loaded days as typed Parquet files, for engines that read a folder of them.

    <out>/<resource>/account=<account>/day=<UTC day>/rows.parquet
    <out>/manifest.json

A file has the rows of a day exactly as the raw table has them. A day that was loaded again gets a new
file in one step, so a reader of all files sees each day once, at any moment. The manifest lists the
files with their rows, cost and a digest of their contents. Files of a renamed or forgotten label are
deleted: their rows now have another label, or are deleted too.
"""

from __future__ import annotations

import hashlib
import re
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
from faletl.line.report import Progress, no_progress
from faletl.resources import RESOURCES
from faletl.selection import EVERYTHING_DUE, Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import current_loads, rows_of_windows
from faletl.warehouse.protocol import Warehouse
from faletl.windows import Window
from faletl.wire import UNREADABLE

FILE, MANIFEST = "rows.parquet", "manifest.json"
_OWN_FILE = re.compile(rf"{re.escape(FILE)}|\d{{8}}T\d{{12}}Z-[0-9a-f-]+\.parquet", re.ASCII)


@dataclass(slots=True)
class HandoverReport:
    """Files written, the number of files that were up to date, and files deleted."""

    written: list[Path] = field(default_factory=list)
    unchanged: int = 0
    deleted: list[Path] = field(default_factory=list)


class Day(msgspec.Struct, frozen=True):
    """A file in the manifest; `cost_total` is exact, and null if rows have no cost."""

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
    settings: Settings, out: Path, selection: Asked = EVERYTHING_DUE, progress: Progress = no_progress
) -> HandoverReport:
    """Write the selected loaded days (default: all) to the folder, and delete outdated files.

    Raises:
        UsageError: there is no warehouse yet.
        StorageError: the folder cannot be written, or the landing folder cannot be read.
    """
    warehouse, report = open_warehouse(settings), HandoverReport()
    by_folder: dict[Path, list[sa.RowMapping]] = {}
    for load in current_loads(warehouse, selection):
        by_folder.setdefault(_folder(out, load), []).append(load)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that a rename puts a finished file in place.
        with scratch_folder(out) as scratch:
            listed = _read_manifest(out)
            try:
                for done, (folder, loads) in enumerate(by_folder.items()):
                    progress("handing over", done, len(by_folder))
                    _fill(warehouse, out, folder, loads, listed, report, scratch, settings.memory)
                for label in _ended_labels(settings):
                    for folder in _folders_of(out, label, selection):
                        if folder not in by_folder:
                            _delete_files(out, folder, listed, report)
            finally:
                _write_manifest(out, listed, scratch)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror}") from None
    progress("handing over", len(by_folder), len(by_folder))
    return report


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
    report: HandoverReport,
    scratch: Path,
    memory: str,
) -> None:
    """Write the day's file to scratch and rename it into place, unless it is up to date."""
    path = folder / FILE
    name = path.relative_to(out).as_posix()
    contents = "\n".join(sorted(f"{load['load_id']} {load['digest']}" for load in loads))
    digest = hashlib.sha256(contents.encode()).hexdigest()
    if name in listed and listed[name].digest == digest and path.exists():
        report.unchanged += 1
        return
    resource, account = RESOURCES[loads[0]["resource"]], loads[0]["account"]
    windows = [Window(load["window_start"], load["window_end"]) for load in loads]
    part = scratch / FILE
    with warehouse.reading() as connection:
        if connection is None:
            return
        warehouse.export_rows(connection, rows_of_windows(resource, account, windows), part)
    rows, cost_total = _figures(part, memory)
    folder.mkdir(parents=True, exist_ok=True)
    for older in _own_files(folder):
        if older != path:  # the name that an older faletl gave it
            older.replace(path)
    part.replace(path)
    report.written.append(path)
    listed[name] = Day(name, resource.name, account, windows[0].day, rows, cost_total, digest)


def _figures(path: Path, memory: str) -> tuple[int, str | None]:
    with duck.room_to_spill() as scratch, duck.engine(memory, scratch) as engine:
        rows = engine.from_parquet(str(path))
        cost = "sum(cost_total)::varchar" if "cost_total" in rows.columns else "null"
        row = rows.aggregate(f"count(*), {cost}").fetchone()
    return (int(row[0]), row[1]) if row else (0, None)


def _delete_files(out: Path, folder: Path, listed: dict[str, Day], report: HandoverReport) -> None:
    for file in _own_files(folder):
        file.unlink()
        report.deleted.append(file)
        listed.pop(file.relative_to(out).as_posix(), None)
    with suppress(OSError):  # the folder has other files too
        folder.rmdir()


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a day that faletl wrote, this version or an older one."""
    yield from (path for path in folder.glob("*.parquet") if _OWN_FILE.fullmatch(path.name))


def _folders_of(out: Path, label: str, selection: Asked) -> Iterator[Path]:
    """Yield the folders of the label's selected days."""
    for folder in sorted(out.glob(f"*/{_of_account(label)}/day=*")):
        try:
            window = Window.of_day(date.fromisoformat(folder.name.removeprefix("day=")))
        except ValueError:  # the folder of another program
            continue
        if selection.includes(folder.parents[1].name, window):
            yield folder


def _ended_labels(settings: Settings) -> set[str]:
    """Return the labels that people renamed or forgot; another account may have one of them now.

    Folders of other labels stay, because another warehouse may write to the same folder.
    """
    return {
        decision.account
        for decision in decisions.recorded(settings)
        if isinstance(decision, AccountRenamed | AccountForgotten)
    }


# --- The manifest ---------------------------------------------------------------------------------


def _read_manifest(out: Path) -> dict[str, Day]:
    """Return the files that the manifest lists, by path; none if the manifest cannot be read.

    Files that are not listed are written again.
    """
    try:
        content = (out / MANIFEST).read_bytes()
        return {file.path: file for file in msgspec.json.decode(content, type=_Manifest).files}
    except (FileNotFoundError, *UNREADABLE):
        return {}


def _write_manifest(out: Path, listed: dict[str, Day], scratch: Path) -> None:
    files = _Manifest([listed[path] for path in sorted(listed)])
    part = scratch / MANIFEST
    part.write_bytes(msgspec.json.format(msgspec.json.encode(files), indent=1))
    part.replace(out / MANIFEST)
