"""Quarantine: list rows that violate fal's contract, and load them again from the landed pages.

Staging quarantines a row together with its window (faletl/staging/window.py). When a newer faletl can
read it, a retry stages and loads its pages again; fal is not called.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import DataRefusedError, UsageError
from faletl.landing import extracts
from faletl.line import relabel
from faletl.line.load import load_extracts
from faletl.line.release import build_and_publish
from faletl.line.report import Progress, Report, WindowResult, new_run_id, no_progress
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import QUARANTINE
from faletl.windows import DAY


def quarantined_rows(
    settings: Settings, load_id: str | None = None, *, is_open: bool = True
) -> Sequence[sa.RowMapping]:
    """Return rows of ops.quarantine, newest extracts first: of one extract, the open ones, or all.

    Raises:
        UsageError: no row of that extract was ever quarantined.
    """
    table = QUARANTINE.c
    query = sa.select(QUARANTINE).order_by(table.seen_at.desc(), table.load_id, table.page, table.row)
    if load_id is not None:
        query = query.where(table.load_id == load_id)
    elif is_open:
        query = query.where(table.resolved_at.is_(None))
    with open_warehouse(settings).reading() as connection:
        rows = connection.execute(query).mappings().all() if connection is not None else []
    if load_id is not None and not rows:
        raise UsageError(
            f"no row of extract {load_id!a} is quarantined; see faletl quarantine list --all"
        )
    return rows


def retry(settings: Settings, load_ids: Sequence[str] = (), progress: Progress = no_progress) -> Report:
    """Stage and load the pages of open rows again: all of them, or those of the named extracts.

    A refused window is loaded. A window that was loaded without some rows is replaced by all its rows,
    if they pass the same checks as any extract. Rows that still violate the contract stay quarantined,
    and the report lists them as failures.

    Raises:
        UsageError: one of the extracts has no open row.
        TamperedError: landed pages are gone or were changed.
    """
    report = Report(new_run_id())
    open_rows = quarantined_rows(settings)
    if unknown := sorted(set(load_ids) - {row["load_id"] for row in open_rows}):
        raise UsageError(
            f"extract {unknown[0]!a} has no open row in quarantine; see faletl quarantine list --all"
        )
    rows = {row["load_id"]: row for row in open_rows if not load_ids or row["load_id"] in load_ids}
    folders = [extracts.root(settings) / row["landing_path"] for row in rows.values()]
    with open_warehouse(settings).reading() as connection:
        opened = [relabel.opener(settings, connection)(folder) for folder in folders]
    load_extracts(settings, [landed for landed in opened if landed], report, progress)
    for outcome in report.outcomes:
        if outcome.outcome != "loaded":
            report.failures.append((None, _still_broken(outcome, rows[outcome.path.name])))
    if report.outcomes:
        build_and_publish(settings, report)
    return report


def _still_broken(outcome: WindowResult, row: sa.RowMapping) -> DataRefusedError:
    message = f"a row still violates fal's contract ({ascii(row['reason'])[1:-1]}); it stays quarantined"
    if outcome.outcome == "superseded":
        day = outcome.window.day
        message = (
            f"a newer extract is loaded; fetch the day again: faletl run --start {day} --end {day + DAY}"
        )
    return DataRefusedError(
        message, resource=outcome.resource, window=str(outcome.window), page=row["page"], row=row["row"]
    )
