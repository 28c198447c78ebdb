"""Quarantine: look at rows that broke their contract, and replay them from the landed pages.

A row is set aside by staging, with its window (faletl/staging/window.py). When faletl has learned to
read it, a retry takes its pages through the line once more; fal is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import DataRefusedError, UsageError
from faletl.landing import extracts
from faletl.line import relabel
from faletl.line.load import load_reads
from faletl.line.release import build_and_publish
from faletl.line.report import Outcome, Progress, Report, new_run_id, silent
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import QUARANTINE
from faletl.windows import DAY


def quarantined_rows(
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

    A window that was refused is loaded; one that was loaded without its rows is replaced by all of them,
    if these pass as any read must. What still breaks its contract stays as it is, and is in the report.

    Raises:
        UsageError: nothing is open of one of the reads.
        TamperedError: their landed pages are gone, or are not those that were landed.
    """
    report = Report(new_run_id())
    found = quarantined_rows(settings)
    if gone := sorted(set(load_ids) - {row["load_id"] for row in found}):
        raise UsageError(f"nothing is open of a read {gone[0]!a}; see faletl quarantine list --all")
    rows = {row["load_id"]: row for row in found if not load_ids or row["load_id"] in load_ids}
    folders = [extracts.root(settings) / row["landing_path"] for row in rows.values()]
    with open_warehouse(settings).reading() as connection:
        opened = [relabel.opener(settings, connection)(folder) for folder in folders]
    load_reads(settings, [landed for landed in opened if landed], report, progress)
    for one in report.outcomes:
        if one.outcome != "loaded":
            report.failures.append((None, _not_mended(one, rows[one.path.name])))
    if report.outcomes:
        build_and_publish(settings, report)
    return report


def _not_mended(outcome: Outcome, row: sa.RowMapping) -> DataRefusedError:
    why = f"a row still cannot be right ({ascii(row['reason'])[1:-1]}); it stays set aside"
    if outcome.outcome == "superseded":
        day = outcome.window.day
        why = f"a newer read holds the window; read it again: faletl run --start {day} --end {day + DAY}"
    return DataRefusedError(
        why, resource=outcome.resource, window=str(outcome.window), page=row["page"], row=row["row"]
    )
