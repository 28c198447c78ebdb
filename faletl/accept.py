"""Accept: a person decides about a window that is held, or that a contract rule refused."""

from __future__ import annotations

import secrets
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Literal

import sqlalchemy as sa

from faletl import decisions, landing, pipeline, relabel
from faletl.config import Settings
from faletl.decisions import WindowAccepted
from faletl.errors import UsageError
from faletl.load import confirm_window, replace_window
from faletl.money import plain
from faletl.pipeline import Report
from faletl.places import scratch_folder
from faletl.staging import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import HOLDS, QUARANTINE
from faletl.windows import Window


def accept(
    settings: Settings,
    resource: str,
    day: date,
    *,
    reason: str,
    account: str | None = None,
    is_kept: bool = False,
) -> Report:
    """Load the held extract of a UTC day, or the refused rows of one; build and publish the change.

    With `is_kept` what is loaded is confirmed instead, and the day is not held any longer. What is
    accepted holds for later extracts that lack, or have, the very same rows.

    Raises:
        UsageError: nothing of that day is held or refused, or that of several accounts is.
        TamperedError: the landed pages of the extract are not those that were landed.
    """
    if not reason.strip() or not reason.isprintable():
        raise UsageError("--reason needs a text that says why, on one line")
    report = Report(pipeline.new_run_id())
    held = _one_of(settings, HOLDS, resource, day, account)
    if held is not None and is_kept:
        _keep(settings, report, held, reason)
    elif held is not None:
        _load_held(settings, report, held, reason)
    if not report.outcomes and not report.failures:
        raise UsageError(
            f"nothing of {resource} {day} is held{'' if is_kept else ' or quarantined'}; faletl status "
            "shows what is"
        )
    pipeline.build_and_publish(settings, report)
    return report


def _one_of(
    settings: Settings, table: sa.Table, resource: str, day: date, account: str | None
) -> sa.RowMapping | None:
    """The newest row about that day; None if there is none."""
    window = Window.of_day(day)
    query = sa.select(table).where(
        table.c.resource == resource,
        table.c.window_start >= window.start,
        table.c.window_start < window.end,
    )
    if account is not None:
        query = query.where(table.c.account == account)
    if table is QUARANTINE:
        query = query.where(table.c.resolved_at.is_(None)).order_by(table.c.seen_at)
    with open_warehouse(settings).reading() as connection:
        found = connection.execute(query).mappings().all() if connection is not None else []
    if len(accounts := sorted({row["account"] for row in found})) > 1:
        names = ", ".join(map(repr, accounts))
        raise UsageError(f"{resource} {day} is meant of which account? Add --account: {names}")
    return found[-1] if found else None


def _load_held(settings: Settings, report: Report, held: sa.RowMapping, reason: str) -> None:
    landed = relabel.opener(settings)(landing.root(settings) / held["landing_path"])
    if landed is None:
        raise UsageError(f"the account {held['account']!a} was forgotten meanwhile (faletl accounts)")
    with scratch_folder() as scratch:
        staged = stage_window(settings, landed, scratch)
        _load(settings, report, staged, _acceptance(held, "held", held["rows_digest"], reason))


def _keep(settings: Settings, report: Report, held: sa.RowMapping, reason: str) -> None:
    acceptance = _acceptance(held, "kept", held["rows_digest"], reason)
    with open_warehouse(settings).lease(f"faletl accept, run {report.run_id}") as lease:
        confirm_window(settings, lease, acceptance)
    window = Window.of_day(held["window_start"].astimezone(UTC).date())
    folder = landing.root(settings) / held["landing_path"]
    kept = pipeline.Outcome(held["resource"], window, "kept", held["rows_loaded"], folder)
    report.outcomes.append(kept)


def _load(settings: Settings, report: Report, staged: Staged, acceptance: WindowAccepted) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.lease(f"faletl accept, run {report.run_id}") as lease:
        replaced = replace_window(settings, warehouse, lease, staged, acceptance)
    pipeline.note_outcome(report, staged, replaced)


def _acceptance(
    held: sa.RowMapping, accepted: Literal["held", "kept"], rows_digest: str, reason: str
) -> WindowAccepted:
    return WindowAccepted(
        decided_at=datetime.now(UTC),
        decided_by=decisions.user_name(),
        acceptance_id=secrets.token_hex(8),
        account=held["account"],
        resource=held["resource"],
        window_start=held["window_start"].astimezone(UTC),
        load_id=held["load_id"],
        accepted=accepted,
        rows_digest=rows_digest,
        reason=reason,
        rows_before=held["rows_loaded"],
        rows_after=held["rows_extracted"],
        cost_total_before=plain(held["cost_total_loaded"] or Decimal(0)),
        cost_total_after=plain(held["cost_total_extracted"] or Decimal(0)),
    )
