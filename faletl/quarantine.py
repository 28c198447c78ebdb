"""Quarantine: look at rows that broke their contract, and replay them from the landed pages.

A row is set aside by staging, with its window (faletl/staging.py). When faletl has learned to read
it, a retry takes its pages through the line once more; fal is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC
from pathlib import Path

import sqlalchemy as sa

from faletl import landing, pipeline
from faletl.config import Settings
from faletl.errors import DataRefusedError, UsageError
from faletl.pipeline import Progress, Report, silent
from faletl.rebuild import rebuild
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import LOADS, QUARANTINE
from faletl.windows import Window


def rows_set_aside(
    settings: Settings, load_id: str | None = None, *, is_open: bool = True
) -> Sequence[sa.RowMapping]:
    """The rows in ops.quarantine, the newest reads first: of one read, or all, resolved ones or not.

    Raises:
        UsageError: nothing is there of that read.
    """
    table = QUARANTINE.c
    query = sa.select(QUARANTINE).order_by(table.seen_at.desc(), table.load_id, table.page, table.row)
    if load_id is not None:
        query = query.where(table.load_id == load_id)
    elif is_open:
        query = query.where(table.resolved_at.is_(None))
    with open_warehouse(settings).reading() as connection:
        found = connection.execute(query).mappings().all() if connection is not None else []
    if load_id is not None and not found:
        raise UsageError(f"nothing is set aside of a read {load_id!a}; see faletl quarantine list --all")
    return found


def retry(settings: Settings, load_ids: Sequence[str] = (), progress: Progress = silent) -> Report:
    """Take the pages of open rows through the line once more: all of them, or those of some reads.

    A window that was refused is loaded; one that was loaded without its rows is made anew with them.
    What still breaks its contract stays as it is, and is in the report.

    Raises:
        UsageError: nothing is open of one of the reads.
        TamperedError: their landed pages are gone, or are not those that were landed.
    """
    report = pipeline.Report(pipeline.new_run_id())
    found = rows_set_aside(settings)
    if gone := sorted(set(load_ids) - {row["load_id"] for row in found}):
        raise UsageError(f"nothing is open of a read {gone[0]!a}; see faletl quarantine list --all")
    reads = {row["load_id"]: row for row in found if not load_ids or row["load_id"] in load_ids}
    held = _held(settings, reads)
    folders = [Path(settings.landing) / row["landing_path"] for row in reads.values()]
    refused = [landing.open_read(folder) for folder in folders if folder.name not in held]
    pipeline.load_reads(settings, refused, report, progress)
    for day in sorted({reads[load_id]["window_start"].astimezone(UTC).date() for load_id in held}):
        report.outcomes += rebuild(settings, day, progress).outcomes
    for row in {row["load_id"]: row for row in rows_set_aside(settings)}.values():
        if row["load_id"] in held:
            report.failures.append((None, _still_broken(row)))
    if report.outcomes:
        pipeline.build_and_publish(settings, report)
    return report


def _held(settings: Settings, load_ids: Iterable[str]) -> set[str]:
    """Those of the reads that hold their window now, without the rows."""
    with open_warehouse(settings).reading() as connection:
        if connection is None:
            return set()
        current = sa.select(LOADS.c.load_id).where(LOADS.c.is_current)
        return set(load_ids) & set(connection.execute(current).scalars())


def _still_broken(row: sa.RowMapping) -> DataRefusedError:
    return DataRefusedError(
        f"a row still cannot be right: {ascii(row['reason'])[1:-1]}; it stays set aside",
        resource=row["resource"],
        window=str(Window.of_day(row["window_start"].astimezone(UTC).date())),
        page=row["page"],
        row=row["row"],
    )
