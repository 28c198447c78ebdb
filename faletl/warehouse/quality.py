"""What ops keeps of quality: quarantined rows, drift, validations, failures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from faletl.errors import AccountLockedError, FaletlError
from faletl.landing.extracts import Manifest
from faletl.warehouse import alerts
from faletl.warehouse.ledger import of_window
from faletl.warehouse.protocol import Lease
from faletl.warehouse.tables import CONTRACT_DRIFT, FAILURES, LOADS, QUARANTINE, VALIDATIONS
from faletl.windows import ExtractRef, Window, WindowKey

if TYPE_CHECKING:
    pass
from faletl.findings import Drift, Findings, Validation
from faletl.warehouse.ledger import fence

log = logging.getLogger(__name__)


def keep_findings(
    lease: Lease,
    findings: Findings,
    outcome: Literal["loaded", "unchanged", "refused"],
    *,
    at: datetime,
) -> None:
    """Inside a transaction: keep them; a drift that was not known yet is warned about.

    A read that was loaded (`at`), or found the same rows, resolves what was set aside of its window
    before; one that was refused takes the place of earlier ones that were refused. The rows of the read
    that holds the window stay open as long as reads find them still broken.
    """
    extract, connection = findings.extract, lease.connection
    is_kept = _settle(lease, findings, outcome, at)
    _insert(
        connection,
        QUARANTINE,
        []
        if is_kept
        else [
            {
                **extract.columns,
                "run_id": extract.run_id,
                "page": one.page,
                "row": one.row,
                "endpoint_id": one.endpoint_id,
                "reason": one.reason,
                "raw_json": one.raw_json,
                "landing_path": extract.path,
                "fencing_token": lease.token,
                "seen_at": extract.finished_at,
            }
            for one in findings.quarantined
        ],
    )
    _note(connection, extract, findings.drifts)
    if findings.validations:
        keep_validations(
            connection, extract.key, extract.extract_id, extract.run_id, findings.validations
        )


def keep_validations(
    connection: sa.Connection,
    key: WindowKey,
    load_id: str,
    run_id: str,
    validations: Sequence[Validation],
) -> None:
    """Inside a transaction: what was found of the read last takes the place of what was before."""
    connection.execute(sa.delete(VALIDATIONS).where(VALIDATIONS.c.load_id == load_id))
    own = {**key.columns, "load_id": load_id, "run_id": run_id}
    _insert(connection, VALIDATIONS, [{**own, **_fields(one)} for one in validations])


def _fields(validation: Validation) -> dict[str, Any]:
    return {name: getattr(validation, name) for name in Validation.__slots__}


def _settle(
    lease: Lease,
    findings: Findings,
    outcome: Literal["loaded", "unchanged", "refused"],
    at: datetime,
) -> bool:
    """What earlier reads of the same window had set aside is not open any more.

    Returns whether it still is: where the read that holds the window has open rows, and this one
    does not take its place.
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
    if not key.window.is_snapshot:  # a newer snapshot says all that an older one did
        earlier = sa.and_(earlier, table.window_start >= day.start)
    own = table.load_id == extract.extract_id
    if not connection.execute(sa.select(sa.func.count()).where(sa.or_(earlier, own))).scalar_one():
        return False  # as nearly always
    holding = sa.union(
        sa.select(LOADS.c.load_id).where(LOADS.c.is_current),
        sa.select(LOADS.c.last_load_id).where(LOADS.c.is_current),
    )
    of_holder = sa.and_(earlier, table.load_id.in_(holding))
    has_open = connection.execute(sa.select(sa.func.count()).where(of_holder)).scalar_one() > 0
    if outcome == "refused":
        connection.execute(sa.delete(QUARANTINE).where(earlier, table.load_id.not_in(holding)))
        is_own = connection.execute(sa.select(sa.func.count()).where(of_holder, own)).scalar_one()
        return bool(is_own)
    if outcome == "unchanged" and has_open and findings.breaches:
        return True
    resolved = {"resolved_at": at, "fencing_token": lease.token}
    connection.execute(sa.delete(QUARANTINE).where(own))
    connection.execute(sa.update(QUARANTINE).where(earlier).values(resolved))
    return False


def _note(connection: sa.Connection, extract: ExtractRef, drifts: Sequence[Drift]) -> None:
    if not drifts:
        return
    key, table = extract.key, CONTRACT_DRIFT.c
    found = connection.execute(
        sa.select(table.field, table.kind).where(
            table.account == key.account, table.resource == key.resource
        )
    )
    known = {(field, kind) for field, kind in found}
    fresh = [one for one in drifts if (one.field, one.kind) not in known]
    for one in fresh:
        log.warning("%s: %s (seen first in window %s, load %s; ops.contract_drift keeps it)",
                    key.resource, _sentence(one), key.window, extract.extract_id)  # fmt: skip
    _insert(
        connection,
        CONTRACT_DRIFT,
        [
            {
                "account": key.account,
                "resource": key.resource,
                "field": one.field,
                "kind": one.kind,
                "sample": one.sample,
                "load_id": extract.extract_id,
                "first_seen_at": extract.finished_at,
                "landing_path": extract.path,
            }
            for one in fresh
        ],
    )


def _sentence(drift: Drift) -> str:
    field = ascii(drift.field)[1:-1]
    match drift.kind:
        case "new":
            return f"fal sends a field that is not known, {field}; it is kept in the landed pages alone"
        case "missing":
            return f"fal does not send {field} any more"
        case "retyped":
            return f"fal sends {field} in another type: {ascii(drift.sample)[1:-1]}"


def _insert(connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    for first in range(0, len(rows), 100):
        connection.execute(sa.insert(table).values(list(rows[first : first + 100])))


REFUSED = 3
"""The exit code of what a check refused (README, "Exit codes")."""


LOCKED = "the account"
"""The subject of the alert that fal locked the account."""


def failures_of(manifest: Manifest) -> sa.ColumnElement[bool]:
    """Those of the window; of a snapshot also those of earlier ones, as it says all that they would."""
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
    """Keep a window's failure for `faletl status`, in place of an older one, and what was noticed.

    A window that is refused (exit code 3) raises an alert, and is news to reports when it first is. It
    stays refused while fal cannot be asked again.
    """
    same = sa.and_(
        FAILURES.c.account == account,
        FAILURES.c.resource == resource,
        FAILURES.c.window_start == window.start,
    )
    is_refused = error.exit_code == REFUSED
    with lease.transaction():
        connection, now = lease.connection, datetime.now(UTC)
        before = connection.execute(
            sa.select(FAILURES.c.error, FAILURES.c.exit_code, FAILURES.c.data_version).where(same)
        ).first()
        is_lock = isinstance(error, AccountLockedError)
        if before is not None and before.exit_code == REFUSED and not (is_refused or is_lock):
            return
        known = (
            before.data_version if before is not None and before.error == type(error).__name__ else None
        )
        data_version = fence(lease, changes_data=is_refused and known is None)
        connection.execute(sa.delete(FAILURES).where(same))
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
                data_version=data_version if known is None else known,
            )
        )
        if isinstance(error.findings, Findings):
            keep_findings(lease, error.findings, "refused", at=now)
        if is_refused:
            key = (resource, window.start.isoformat(), run_id)
            alert = alerts.Alert("refused", account, f"{resource} {window.day}", str(error), key)
            alerts.raise_alert(connection, alert, now)
        if is_lock:
            alert = alerts.Alert("locked", account, LOCKED, error.message, (run_id,))
            alerts.raise_alert(connection, alert, now)
