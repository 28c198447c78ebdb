"""What was noticed of a read: rows set aside, drift of fal's contract, what the gate found.

It is kept in tables of ops, for reads that were loaded and for reads that were refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

import msgspec
import sqlalchemy as sa

from faletl.config import Settings
from faletl.fal.pages import UNREADABLE
from faletl.landing.extracts import Landed, Manifest, relative_path
from faletl.warehouse import Lease
from faletl.warehouse.tables import CONTRACT_DRIFT, LOADS, QUARANTINE, VALIDATIONS
from faletl.windows import Window

log = logging.getLogger(__name__)

Severity = Literal["critical", "warning", "info"]

_LONGEST = 65_536  # characters of a row that are kept; its landed page has all
_LONGEST_ID = 1000  # and of its endpoint id


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that broke its contract: where it stands, why, and the row as fal sent it."""

    page: int
    row: int
    reason: str
    raw_json: str
    endpoint_id: str | None

    @classmethod
    def of(cls, page: int, row: int, reason: str, record: bytes) -> Self:
        """From the record's bytes; they are JSON, but may be anything else than a record."""
        try:
            endpoint_id = msgspec.json.decode(record, type=_WithEndpoint).endpoint_id[:_LONGEST_ID]
        except UNREADABLE:
            endpoint_id = None
        text = record[: 4 * _LONGEST].decode("utf-8", "replace")[:_LONGEST]
        return cls(page, row, reason, text, endpoint_id)


class _WithEndpoint(msgspec.Struct):
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class Drift:
    """A field that fal added, dropped or gave another type; with one such value, if there is one."""

    field: str
    kind: Literal["new", "missing", "retyped"]
    sample: str | None


@dataclass(frozen=True, slots=True)
class Validation:
    """What the gate found of one expectation. `sample_keys` is JSON: keys of some unexpected rows."""

    expectation: str
    severity: Severity
    success: bool
    observed: str
    unexpected_count: int
    sample_keys: str
    validated_at: datetime


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was noticed of one read. `breaches` counts the rows that were set aside, also those
    that are too many to be kept in `set_aside`.
    """

    landed: Landed
    breaches: int = 0
    set_aside: tuple[SetAside, ...] = ()
    drifts: tuple[Drift, ...] = ()
    validations: tuple[Validation, ...] = ()

    @property
    def rows_digest(self) -> str:
        """A fingerprint of the window's quarantined rows, in whatever order they came.

        An account's label is not in it, so that what a person accepted holds after a rename.
        """
        manifest = self.landed.manifest
        rows = sorted(one.raw_json for one in self.set_aside)
        whole = (manifest.resource, str(manifest.window.day), self.breaches, rows)
        return hashlib.sha256(repr(whole).encode()).hexdigest()


def acceptance_key(account: str, rows_digest: str) -> str:
    """The key of one acceptance of refused rows, among those of all accounts."""
    return f"{rows_digest} {account}"


def keep_findings(
    settings: Settings,
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
    landed, connection = findings.landed, lease.connection
    manifest, path = landed.manifest, relative_path(settings, landed.folder)
    read = {
        "load_id": manifest.load_id,
        "account": manifest.account,
        "resource": manifest.resource,
        "window_start": manifest.window_start,
    }
    is_kept = _settle(lease, findings, outcome, at)
    _insert(
        connection,
        QUARANTINE,
        []
        if is_kept
        else [
            {
                **read,
                "run_id": manifest.run_id,
                "page": one.page,
                "row": one.row,
                "endpoint_id": one.endpoint_id,
                "reason": one.reason,
                "raw_json": one.raw_json,
                "landing_path": path,
                "fencing_token": lease.token,
                "seen_at": manifest.finished_at,
            }
            for one in findings.set_aside
        ],
    )
    _note(connection, manifest, path, findings.drifts)
    if findings.validations:
        keep_validations(connection, {**read, "run_id": manifest.run_id}, findings.validations)


def keep_validations(
    connection: sa.Connection, read: dict[str, Any], validations: Sequence[Validation]
) -> None:
    """Inside a transaction: what was found of the read last takes the place of what was before."""
    connection.execute(sa.delete(VALIDATIONS).where(VALIDATIONS.c.load_id == read["load_id"]))
    _insert(connection, VALIDATIONS, [{**read, **_fields(one)} for one in validations])


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
    manifest, table, connection = findings.landed.manifest, QUARANTINE.c, lease.connection
    day = Window.of_day(manifest.window.day)
    earlier = sa.and_(
        table.account == manifest.account,
        table.resource == manifest.resource,
        table.window_start < day.end,
        table.seen_at <= manifest.finished_at,
        table.resolved_at.is_(None),
    )
    if not manifest.window.is_snapshot:  # a newer snapshot says all that an older one did
        earlier = sa.and_(earlier, table.window_start >= day.start)
    own = table.load_id == manifest.load_id
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


def _note(connection: sa.Connection, manifest: Manifest, path: str, drifts: Sequence[Drift]) -> None:
    if not drifts:
        return
    table = CONTRACT_DRIFT.c
    found = connection.execute(
        sa.select(table.field, table.kind).where(
            table.account == manifest.account, table.resource == manifest.resource
        )
    )
    known = {(field, kind) for field, kind in found}
    fresh = [one for one in drifts if (one.field, one.kind) not in known]
    for one in fresh:
        log.warning("%s: %s (seen first in window %s, load %s; ops.contract_drift keeps it)",
                    manifest.resource, _sentence(one), manifest.window, manifest.load_id)  # fmt: skip
    _insert(
        connection,
        CONTRACT_DRIFT,
        [
            {
                "account": manifest.account,
                "resource": manifest.resource,
                "field": one.field,
                "kind": one.kind,
                "sample": one.sample,
                "load_id": manifest.load_id,
                "first_seen_at": manifest.finished_at,
                "landing_path": path,
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
