"""Accept: a person decides about a window that is held, or that a contract rule refused."""

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
from faletl.line.report import Outcome, Report, new_run_id, note_outcome
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

    With `is_kept` what is loaded is confirmed instead, and the day is not held any longer. What is
    accepted holds for later extracts that lack, or have, the very same rows.

    Raises:
        UsageError: nothing of that day is held or refused, or that of several accounts is.
        TamperedError: the landed pages of the extract are not those that were landed.
        SharedChargesError, UnknownOverlapError: it is, or may be, loaded under another label.
    """
    if not reason.strip() or not reason.isprintable():
        raise UsageError("--reason needs a text that says why, on one line")
    report = Report(new_run_id())
    held = _one_of(settings, HOLDS, resource, day, account)
    refused = None if is_kept else _one_of(settings, QUARANTINE, resource, day, account)
    # The newest extract is meant: its id begins with when it began.
    is_held_newest = refused is None or (held is not None and held["load_id"] > refused["load_id"])
    if held is not None and is_kept:
        _keep(settings, report, held, reason)
    elif held is not None and is_held_newest:
        _load_held(settings, report, held, reason)
    elif refused is not None:
        _load_refused(settings, report, refused, reason)
    if not report.outcomes and not report.failures:
        raise UsageError(
            f"nothing of {resource} {day} is held{'' if is_kept else ' or quarantined'}; faletl status "
            "shows what is"
        )
    build_and_publish(settings, report)
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
        query = query.where(table.c.resolved_at.is_(None)).order_by(table.c.load_id)
    with open_warehouse(settings).reading() as connection:
        found = connection.execute(query).mappings().all() if connection is not None else []
    if len(accounts := sorted({row["account"] for row in found})) > 1:
        names = ", ".join(map(repr, accounts))
        raise UsageError(
            f"several accounts have {resource} {day} held or quarantined; add --account: {names}"
        )
    return found[-1] if found else None


def _opened(settings: Settings, row: sa.RowMapping) -> SealedExtract:
    """The extract that the row is about."""
    with open_warehouse(settings).reading() as connection:
        landed = relabel.opener(settings, connection)(extracts.root(settings) / row["landing_path"])
    if landed is None:
        raise UsageError(f"the account {row['account']!a} was forgotten meanwhile (faletl accounts)")
    return landed


def _load_held(settings: Settings, report: Report, held: sa.RowMapping, reason: str) -> None:
    landed = _opened(settings, held)
    with open_warehouse(settings).reading() as connection:
        accepted = holds.accepted_rows(connection)
    with scratch_folder() as scratch:
        staged = stage_window(settings, landed, scratch, accepted)
        _load(settings, report, staged, _acceptance(held, "held", reason))


def _load_refused(settings: Settings, report: Report, refused: sa.RowMapping, reason: str) -> None:
    """Load an extract whose rows break a contract rule; one that does not any longer needs no word."""
    landed = _opened(settings, refused)
    with scratch_folder() as scratch:
        try:
            stage_window(settings, landed, scratch).discard()
        except DataRefusedError as error:
            digest = error.findings.rows_digest if isinstance(error.findings, Findings) else ""
        else:
            raise UsageError(
                "the quarantined rows do not keep their window from being loaded; load them with "
                "faletl quarantine retry"
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
    """What is loaded of the window now."""
    loaded = sa.select(LOADS.c.rows, LOADS.c.cost_total).where(
        of_window(LOADS, manifest.account, manifest.resource, manifest.window.day),
        LOADS.c.is_current,
    )
    with open_warehouse(settings).reading() as connection:
        found = connection.execute(loaded).first() if connection is not None else None
    return holds.Figures(found.rows, found.cost_total) if found else holds.Figures(0, None)


def _keep(settings: Settings, report: Report, held: sa.RowMapping, reason: str) -> None:
    acceptance = _acceptance(held, "kept", reason)
    with open_warehouse(settings).lease(f"faletl accept, run {report.run_id}") as lease:
        confirm_window(settings, lease, acceptance, held["last_extracted_at"])
    window = Window.of_day(held["window_start"].astimezone(UTC).date())
    folder = extracts.root(settings) / held["landing_path"]
    kept = Outcome(held["resource"], window, "kept", held["rows_loaded"], folder)
    report.outcomes.append(kept)


def _load(settings: Settings, report: Report, staged: Staged, acceptance: WindowAccepted) -> None:
    warehouse = open_warehouse(settings)
    with warehouse.lease(f"faletl accept, run {report.run_id}") as lease:
        with lease.transaction():
            refuse_shared(settings, warehouse, lease.connection, staged)
        replaced = replace_window(settings, warehouse, lease, staged, acceptance)
    note_outcome(report, staged, replaced)


def _acceptance(
    held: Mapping[Any, Any], accepted: Literal["held", "kept", "refused"], reason: str
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
        rows_digest=held["rows_digest"],
        reason=reason,
        rows_before=held["rows_loaded"],
        rows_after=held["rows_extracted"],
        cost_total_before=plain(held["cost_total_loaded"] or Decimal(0)),
        cost_total_after=plain(held["cost_total_extracted"] or Decimal(0)),
    )
