"""Records of data quality in ops: quarantined rows, contract drift, validations, failures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from faletl.errors import AccountLockedError, FaletlError
from faletl.findings import Drift, Findings, Validation
from faletl.landing.extracts import Manifest
from faletl.warehouse import alerts
from faletl.warehouse.ledger import fence, of_window
from faletl.warehouse.protocol import Lease
from faletl.warehouse.tables import CONTRACT_DRIFT, FAILURES, LOADS, QUARANTINE, VALIDATIONS
from faletl.windows import ExtractRef, Window, WindowKey

log = logging.getLogger(__name__)


def record_findings(
    lease: Lease,
    findings: Findings,
    outcome: Literal["loaded", "unchanged", "refused"],
    *,
    at: datetime,
) -> None:
    """Record the findings of an extract, inside a transaction, and warn of new contract drift.

    An extract that was loaded at `at`, or that confirmed the loaded rows, resolves the rows quarantined
    before for its window; a refused one replaces earlier refused ones. Quarantined rows of the
    current load stay open while later extracts still find violations.
    """
    extract, connection = findings.extract, lease.connection
    is_still_open = _resolve_earlier(lease, findings, outcome, at)
    _insert(
        connection,
        QUARANTINE,
        []
        if is_still_open
        else [
            {
                **extract.columns,
                "run_id": extract.run_id,
                "page": row.page,
                "row": row.row,
                "endpoint_id": row.endpoint_id,
                "reason": row.reason,
                "raw_json": row.raw_json,
                "landing_path": extract.path,
                "fencing_token": lease.token,
                "seen_at": extract.finished_at,
            }
            for row in findings.quarantined
        ],
    )
    _record_drift(connection, extract, findings.drifts)
    if findings.validations:
        record_validations(
            connection, extract.key, extract.extract_id, extract.run_id, findings.validations
        )


def record_validations(
    connection: sa.Connection,
    key: WindowKey,
    load_id: str,
    run_id: str,
    validations: Sequence[Validation],
) -> None:
    """Replace the validations of the extract, inside a transaction."""
    connection.execute(sa.delete(VALIDATIONS).where(VALIDATIONS.c.load_id == load_id))
    own = {**key.columns, "load_id": load_id, "run_id": run_id}
    _insert(connection, VALIDATIONS, [{**own, **_fields(validation)} for validation in validations])


def _fields(validation: Validation) -> dict[str, Any]:
    return {name: getattr(validation, name) for name in Validation.__slots__}


def _resolve_earlier(
    lease: Lease,
    findings: Findings,
    outcome: Literal["loaded", "unchanged", "refused"],
    at: datetime,
) -> bool:
    """Resolve or delete the rows of the window that earlier extracts quarantined.

    Returns whether they stay open instead: the current load has open rows, and this extract does not
    replace it.
    """
    extract, table, connection = findings.extract, QUARANTINE.c, lease.connection
    key, day = extract.key, Window.of_day(extract.key.window.day)
    earlier = sa.and_(
        table.account == key.account,
        table.resource == key.resource,
        table.window_start < day.end,
        table.seen_at <= extract.finished_at,
        table.resolved_at.is_(None),
    )
    if not key.window.is_snapshot:  # a newer snapshot replaces an older one
        earlier = sa.and_(earlier, table.window_start >= day.start)
    own = table.load_id == extract.extract_id
    if not connection.execute(sa.select(sa.func.count()).where(sa.or_(earlier, own))).scalar_one():
        return False  # the usual case
    current_ids = sa.union(
        sa.select(LOADS.c.load_id).where(LOADS.c.is_current),
        sa.select(LOADS.c.last_load_id).where(LOADS.c.is_current),
    )
    of_current_load = sa.and_(earlier, table.load_id.in_(current_ids))
    has_open = connection.execute(sa.select(sa.func.count()).where(of_current_load)).scalar_one() > 0
    if outcome == "refused":
        connection.execute(sa.delete(QUARANTINE).where(earlier, table.load_id.not_in(current_ids)))
        is_own = connection.execute(sa.select(sa.func.count()).where(of_current_load, own)).scalar_one()
        return bool(is_own)
    if outcome == "unchanged" and has_open and findings.breaches:
        return True
    resolved = {"resolved_at": at, "fencing_token": lease.token}
    connection.execute(sa.delete(QUARANTINE).where(own))
    connection.execute(sa.update(QUARANTINE).where(earlier).values(resolved))
    return False


def _record_drift(connection: sa.Connection, extract: ExtractRef, drifts: Sequence[Drift]) -> None:
    if not drifts:
        return
    key, table = extract.key, CONTRACT_DRIFT.c
    rows = connection.execute(
        sa.select(table.field, table.kind).where(
            table.account == key.account, table.resource == key.resource
        )
    )
    known = {(field, kind) for field, kind in rows}
    new_drifts = [drift for drift in drifts if (drift.field, drift.kind) not in known]
    for drift in new_drifts:
        log.warning("%s: %s (first seen in window %s, extract %s; see ops.contract_drift)",
                    key.resource, _describe(drift), key.window, extract.extract_id)  # fmt: skip
    _insert(
        connection,
        CONTRACT_DRIFT,
        [
            {
                "account": key.account,
                "resource": key.resource,
                "field": drift.field,
                "kind": drift.kind,
                "sample": drift.sample,
                "load_id": extract.extract_id,
                "first_seen_at": extract.finished_at,
                "landing_path": extract.path,
            }
            for drift in new_drifts
        ],
    )


def _describe(drift: Drift) -> str:
    field = ascii(drift.field)[1:-1]
    match drift.kind:
        case "new":
            return f"fal sends an unknown field, {field}; it is kept in the landed pages only"
        case "missing":
            return f"fal no longer sends {field}"
        case "retyped":
            return f"fal sends {field} with another type: {ascii(drift.sample)[1:-1]}"


def _insert(connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    for first in range(0, len(rows), 100):
        connection.execute(sa.insert(table).values(list(rows[first : first + 100])))


REFUSED = 3
"""The exit code of a window that a check refused (README, "Exit codes")."""

LOCKED = "the account"
"""The subject of the alert for an account that fal locked."""


def failures_of(manifest: Manifest) -> sa.ColumnElement[bool]:
    """Return the condition for failures of the window; for a snapshot, also those of earlier ones."""
    own = of_window(FAILURES, manifest.account, manifest.resource, manifest.window.day)
    if not manifest.window.is_snapshot:
        return own
    earlier = sa.and_(
        FAILURES.c.account == manifest.account,
        FAILURES.c.resource == manifest.resource,
        FAILURES.c.window_start <= manifest.window_start,
    )
    return sa.or_(own, earlier)


def record_failure(
    lease: Lease,
    error: FaletlError,
    *,
    account: str,
    resource: str,
    window: Window,
    run_id: str,
) -> None:
    """Record a window's failure for `faletl status`, replacing an older one, and the error's findings.

    A refused window (exit code 3) raises an alert; the first refusal changes what reports show. The
    window stays refused while later attempts fail for other reasons.
    """
    is_same_window = sa.and_(
        FAILURES.c.account == account,
        FAILURES.c.resource == resource,
        FAILURES.c.window_start == window.start,
    )
    is_refused = error.exit_code == REFUSED
    with lease.transaction():
        connection, now = lease.connection, datetime.now(UTC)
        previous = connection.execute(
            sa.select(FAILURES.c.error, FAILURES.c.exit_code, FAILURES.c.data_version).where(
                is_same_window
            )
        ).first()
        is_lock = isinstance(error, AccountLockedError)
        if previous is not None and previous.exit_code == REFUSED and not (is_refused or is_lock):
            return
        known_version = (
            previous.data_version
            if previous is not None and previous.error == type(error).__name__
            else None
        )
        data_version = fence(lease, changes_data=is_refused and known_version is None)
        connection.execute(sa.delete(FAILURES).where(is_same_window))
        connection.execute(
            sa.insert(FAILURES).values(
                run_id=run_id,
                account=account,
                resource=resource,
                window_start=window.start,
                error=type(error).__name__,
                exit_code=error.exit_code,
                message=str(error),
                failed_at=now,
                data_version=data_version if known_version is None else known_version,
            )
        )
        if isinstance(error.findings, Findings):
            record_findings(lease, error.findings, "refused", at=now)
        if is_refused:
            key = (resource, window.start.isoformat(), run_id)
            alert = alerts.Alert("refused", account, f"{resource} {window.day}", str(error), key)
            alerts.raise_alert(connection, alert, now)
        if is_lock:
            alert = alerts.Alert("locked", account, LOCKED, error.message, (run_id,))
            alerts.raise_alert(connection, alert, now)
