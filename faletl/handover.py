"""Handover: loaded windows as typed Parquet files, for engines that take these from a folder.

    <out>/<resource>/account=<account>/day=<UTC day>/<load id>-<digest>.parquet

A file holds the rows of one window as its raw table has them. A window that was loaded anew gets a new
file in place of the old one, so a day's folder always holds that day, once: what is copied by day
(docs/warehouses.md) can be copied again at any time. Of a label that was renamed or forgotten, the
folders of these days are emptied: what they held is in others now, or nowhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from faletl import decisions
from faletl.config import Settings
from faletl.decisions import AccountForgotten, AccountRenamed
from faletl.errors import StorageError
from faletl.load import current_loads, rows_of_window
from faletl.pipeline import DUE, Progress, silent
from faletl.plan import Asked
from faletl.resources import RESOURCES
from faletl.warehouse import Warehouse, open_warehouse
from faletl.windows import Window


@dataclass(slots=True)
class Handed:
    """The files that were written, how many were there already, and those that were out of date."""

    written: list[Path] = field(default_factory=list)
    unchanged: int = 0
    deleted: list[Path] = field(default_factory=list)


def hand_over(settings: Settings, out: Path, asked: Asked = DUE, progress: Progress = silent) -> Handed:
    """Make the folder hold the loaded windows of the days and resources asked for (default: all).

    Raises:
        UsageError: there is no warehouse yet.
        StorageError: the folder cannot be written, or the landing folder cannot be read.
    """
    warehouse, handed = open_warehouse(settings), Handed()
    loads = current_loads(warehouse, asked)
    by_folder: dict[Path, list[sa.RowMapping]] = {}
    for load in loads:
        by_folder.setdefault(_folder(out, load), []).append(load)
    done = 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that a finished file is renamed into its place.
        with tempfile.TemporaryDirectory(prefix=".faletl-", dir=out) as scratch:
            for folder, mine in by_folder.items():
                progress("handing over", done, len(loads))
                _fill(warehouse, folder, mine, handed, Path(scratch))
                done += len(mine)
        for label in _ended_labels(settings):
            for folder in _folders_of(out, label, asked):
                if folder not in by_folder:
                    _empty(folder, handed)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or out}: {error.strerror}") from None
    progress("handing over", done, len(loads))
    return handed


def _folder(out: Path, load: sa.RowMapping) -> Path:
    day = load["window_start"].astimezone(UTC).date()
    return out / str(load["resource"]) / _of_account(load["account"]) / f"day={day}"


def _of_account(label: str) -> str:
    return f"account={quote(label, safe='')}"


def _folders_of(out: Path, label: str, asked: Asked) -> Iterator[Path]:
    """The folders of the label's days that are asked for."""
    for folder in out.glob(f"*/{_of_account(label)}/day=*"):
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


def _fill(
    warehouse: Warehouse,
    folder: Path,
    loads: Sequence[sa.RowMapping],
    handed: Handed,
    scratch: Path,
) -> None:
    """Write what is not there elsewhere, rename it into its place, then delete what is out of date."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"{load['load_id']}-{load['digest'][:8]}.parquet": load for load in loads}
    for path, load in paths.items():
        if path.exists():
            handed.unchanged += 1
            continue
        window = Window(load["window_start"], load["window_end"])
        part = scratch / path.name
        with warehouse.reading() as connection:
            if connection is None:
                continue
            rows = rows_of_window(RESOURCES[load["resource"]], load["account"], window)
            warehouse.hand_out(connection, rows, part)
        part.replace(path)
        handed.written.append(path)
    _empty(folder, handed, paths)


def _empty(folder: Path, handed: Handed, kept: Collection[Path] = ()) -> None:
    for old in folder.glob("*.parquet"):
        if old not in kept:
            old.unlink()
            handed.deleted.append(old)
