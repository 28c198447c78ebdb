"""Accept: load a window that is held or was refused, because a person decides so."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Literal

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import DataRefusedError, UsageError
from faletl.files import scratch_folder
from faletl.findings import Findings, acceptance_key
from faletl.landing import decisions, extracts
from faletl.landing.decisions import WindowAccepted
from faletl.landing.extracts import Manifest, SealedExtract
from faletl.line import holds, relabel
from faletl.line.overlap import refuse_shared
from faletl.line.release import build_and_publish
from faletl.line.replace import confirm_window, replace_window
from faletl.line.report import Report, WindowResult, new_run_id, note_outcome
from faletl.money import plain
from faletl.staging.window import Staged, stage_window
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import of_window
from faletl.warehouse.tables import HOLDS, LOADS, QUARANTINE
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
    """Load the newest extract of a UTC day that is held or refused; build and publish the change.

    With `is_kept`, confirm the loaded rows instead; the day is then no longer held. The decision also
    applies to later extracts with exactly the same rows missing or present.

    Raises:
        UsageError: no such day is held or refused, or it is for several accounts.
        TamperedError: the landed pages of the extract are not those that were landed.
        SharedChargesError, UnknownOverlapError: it is, or may be, loaded under another label.
    """
    if not reason.strip() or not reason.isprintable():
        raise UsageError("--reason must be a text on one line that gives the reason")
    report = Report(new_run_id())
    hold = _newest_row(settings, HOLDS, resource, day, account)
    quarantined = None if is_kept else _newest_row(settings, QUARANTINE, resource, day, account)
    # Take the newer of the two: the id of an extract begins with its start time.
    is_held_newest = quarantined is None or (
        hold is not None and hold["load_id"] > quarantined["load_id"]
    )
    if hold is not None and is_kept:
        _keep(settings, report, hold, reason)
    elif hold is not None and is_held_newest:
        _load_held(settings, report, hold, reason)
    elif quarantined is not None:
        _load_refused(settings, report, quarantined, reason)
    if not report.outcomes and not report.failures:
        raise UsageError(
            f"{resource} {day} is not held{'' if is_kept else ' or quarantined'}; see faletl status"
        )
    build_and_publish(settings, report)
    return report


def _newest_row(
    settings: Settings, table: sa.Table, resource: str, day: date, account: str | None
) -> sa.RowMapping | None:
    """Return the newest row about that day, or None."""
    window = Window.of_day(day)
    query = sa.select(table).where(
        table.c.resource == resource,
        table.c.window_start >= window.start,
        table.c.window_start < window.end,
    )
    if account is not None:
        query = query.where(table.c.account == account)
    if table is QUARANTINE:
        query = query.where(table.c.resolved_at.is_(None)).order_by(table.c.load_id)
    with open_warehouse(settings).reading() as connection:
        rows = connection.execute(query).mappings().all() if connection is not None else []
    if len(accounts := sorted({row["account"] for row in rows})) > 1:
        names = ", ".join(map(repr, accounts))
        raise UsageError(
            f"several accounts have {resource} {day} held or quarantined; add --account: {names}"
        )
    return rows[-1] if rows else None


def _opened(settings: Settings, row: sa.RowMapping) -> SealedExtract:
    """Open the extract that the row is about."""
    with open_warehouse(settings).reading() as connection:
        landed = relabel.opener(settings, connection)(extracts.root(settings) / row["landing_path"])
    if landed is None:
        raise UsageError(
            f"the account {row['account']!a} was forgotten in the meantime (faletl accounts)"
        )
    return landed


def _load_held(settings: Settings, report: Report, hold: sa.RowMapping, reason: str) -> None:
    landed = _opened(settings, hold)
    with open_warehouse(settings).reading() as connection:
        accepted = holds.accepted_rows(connection)
    with scratch_folder() as scratch:
        staged = stage_window(settings, landed, scratch, accepted)
        _load(settings, report, staged, _acceptance(hold, "held", reason))


def _load_refused(settings: Settings, report: Report, refused: sa.RowMapping, reason: str) -> None:
    """Load an extract whose rows violate a contract rule; raises UsageError if none refuses it now."""
    landed = _opened(settings, refused)
    with scratch_folder() as scratch:
        try:
            stage_window(settings, landed, scratch).discard()
        except DataRefusedError as error:
            digest = error.findings.rows_digest if isinstance(error.findings, Findings) else ""
        else:
            raise UsageError(
                "this window loads without a decision; load it with faletl quarantine retry"
            )
        accepted = {acceptance_key(landed.manifest.account, digest)}
        staged = stage_window(settings, landed, scratch, accepted)
        before = _loaded_figures(settings, landed.manifest)
        acceptance = _acceptance(
            {
                **refused,
                "rows_digest": digest,
                "rows_loaded": before.rows,
                "cost_total_loaded": before.cost_total,
                "rows_extracted": staged.rows,
                "cost_total_extracted": Decimal(staged.cost_total),
            },
            "refused",
            reason,
        )
        _load(settings, report, staged, acceptance)


def _loaded_figures(settings: Settings, manifest: Manifest) -> holds.Figures:
    """Return the row count and cost that are loaded for the window now."""
    loaded = sa.select(LOADS.c.rows, LOADS.c.cost_total).where(
        of_window(LOADS, manifest.account, manifest.resource, manifest.window.day),
        LOADS.c.is_current,
    )
    with open_warehouse(settings).reading() as connection:
        row = connection.execute(loaded).first() if connection is not None else None
    return holds.Figures(row.rows, row.cost_total) if row else holds.Figures(0, None)


def _keep(settings: Settings, report: Report, hold: sa.RowMapping, reason: str) -> None:
    acceptance = _acceptance(hold, "kept", reason)
    with open_warehouse(settings).lease(f"faletl accept, run {report.run_id}") as lease:
        confirm_window(settings, lease, acceptance, hold["last_extracted_at"])
    window = Window.of_day(hold["window_start"].astimezone(UTC).date())
    folder = extracts.root(settings) / hold["landing_path"]
    outcome = WindowResult(hold["resource"], window, "kept", hold["rows_loaded"], folder)
    report.outcomes.append(outcome)


def _load(settings: Settings, report: Report, staged: Staged, acceptance: WindowAccepted) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.lease(f"faletl accept, run {report.run_id}") as lease:
        with lease.transaction():
            refuse_shared(settings, warehouse, lease.connection, staged)
        replaced = replace_window(settings, warehouse, lease, staged, acceptance)
    note_outcome(report, staged, replaced)


def _acceptance(
    row: Mapping[Any, Any], accepted: Literal["held", "kept", "refused"], reason: str
) -> WindowAccepted:
    return WindowAccepted(
        decided_at=datetime.now(UTC),
        decided_by=decisions.user_name(),
        acceptance_id=secrets.token_hex(8),
        account=row["account"],
        resource=row["resource"],
        window_start=row["window_start"].astimezone(UTC),
        load_id=row["load_id"],
        accepted=accepted,
        rows_digest=row["rows_digest"],
        reason=reason,
        rows_before=row["rows_loaded"],
        rows_after=row["rows_extracted"],
        cost_total_before=plain(row["cost_total_loaded"] or Decimal(0)),
        cost_total_after=plain(row["cost_total_extracted"] or Decimal(0)),
    )
