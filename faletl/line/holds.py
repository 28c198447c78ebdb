"""Holds: an extract that would remove rows which were proven before is not loaded unattended.

A closed window that had rows is held if a new extract of it has none: the loaded rows stay, and a person
may accept the extract (`faletl accept`). Fal may no longer serve all rows of a window that ended long
ago: there, one missing row is enough, and the hold is final (docs/decisions.md, "Holds").
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from faletl.config import Settings
from faletl.findings import acceptance_key
from faletl.landing.decisions import WindowAccepted, accept_command
from faletl.landing.extracts import Manifest
from faletl.money import plain
from faletl.resources import Resource
from faletl.staging.window import Staged
from faletl.warehouse import alerts
from faletl.warehouse.ledger import of_window
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import ACCEPTANCES, HOLDS, QUARANTINE, RAW

SERVED_FOR = timedelta(days=45)
"""How long after a window's end fal certainly serves all of its rows; its real limit is unknown
(docs/fal-api.md, "Open doubts")."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The number of rows of a window and the sum of their cost_total; None where rows have no cost."""

    rows: int
    cost_total: Decimal | None

    def __str__(self) -> str:
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        return rows if self.cost_total is None else f"{rows} of cost_total {plain(self.cost_total)}"


@dataclass(frozen=True, slots=True)
class Loss:
    """The rows that a window would lose by an extract.

    `rows_digest` is a fingerprint of the missing rows if the extract must be held; None if it is loaded
    with a warning.
    """

    before: Figures
    after: Figures
    rows_digest: str | None = None
    is_final: bool = False


def loss_of(
    warehouse: Warehouse,
    connection: sa.Connection,
    staged: Staged,
    current: sa.RowMapping,
    replaced: sa.ColumnElement[bool],
) -> Loss | None:
    """Return the loss of the window; None if it loses nothing, or has not ended.

    `current` is the current load of the window; `replaced` selects the raw rows that the extract would
    replace, because a resource that is asked by ids may have others.
    """
    manifest, resource = staged.landed.manifest, staged.resource
    if manifest.window.is_snapshot or manifest.window.is_provisional:
        return None
    before = _loaded_figures(connection, resource, current, replaced)
    after = Figures(staged.rows, None if before.cost_total is None else Decimal(staged.cost_total))
    is_old = manifest.started_at - manifest.window.end > SERVED_FOR
    is_emptied = before.rows > 0 and not after.rows
    if (is_old or is_emptied) and (missing := _missing_rows(warehouse, connection, staged, replaced)):
        return Loss(before, after, f"{missing} of {before}" if is_emptied else missing, is_old)
    is_less = after.rows < before.rows or (after.cost_total or 0) < (before.cost_total or 0)
    return Loss(before, after) if is_less else None


def _loaded_figures(
    connection: sa.Connection,
    resource: Resource,
    current: sa.RowMapping,
    replaced: sa.ColumnElement[bool],
) -> Figures:
    cost = current["cost_total"] if "cost_total" in RAW[resource.name].c else None
    if resource.ids_per_call is None:
        return Figures(current["rows"], cost)
    rows = sa.select(sa.func.count()).select_from(RAW[resource.name]).where(replaced)
    return Figures(connection.execute(rows).scalar_one(), cost)


def _missing_rows(
    warehouse: Warehouse, connection: sa.Connection, staged: Staged, replaced: sa.ColumnElement[bool]
) -> str | None:
    """Return a fingerprint of the loaded rows that the extract lacks; None if it lacks none.

    Rows are identified by when and for what they were charged, not by amounts or labels, which fal may
    restate. The account's label is not included either, so that an acceptance survives a rename.
    """
    table = RAW[staged.resource.name]
    names = staged.resource.identifying
    extracted = sa.Table("extracted_rows", sa.MetaData(), *(sa.Column(c.name, c.type) for c in table.c))
    connection.exec_driver_sql(
        f"create temporary table {extracted.name} as select * from {table.fullname} limit 0"
    )
    warehouse.load_rows(connection, extracted, staged.source, staged.files[0].parent)
    extracted_keys = sa.select(*(extracted.c[name] for name in names), sa.literal(-1).label("n"))
    loaded_keys = sa.select(*(table.c[name] for name in names), sa.literal(1).label("n")).where(replaced)
    keys = sa.union_all(loaded_keys, extracted_keys).subquery()
    key = [keys.c[name] for name in names]
    lacking = sa.select(*key, sa.func.sum(keys.c.n)).group_by(*key).having(sa.func.sum(keys.c.n) > 0)
    digest, is_any = hashlib.sha256(), False
    for row in connection.execute(lacking.order_by(*key)):
        digest.update(repr([_text(value) for value in row]).encode())
        is_any = True
    connection.exec_driver_sql(f"drop table {extracted.name}")
    return digest.hexdigest() if is_any else None


def _text(value: object) -> str:
    """Format a value so that it is the same from any database and in any time zone."""
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)


# --- ops.holds ------------------------------------------------------------------------------------


def hold(settings: Settings, lease: Lease, staged: Staged, loss: Loss, data_version: int) -> None:
    """Record a held extract, replacing an earlier one of the window, inside a transaction."""
    manifest, connection = staged.landed.manifest, lease.connection
    since = connection.execute(
        sa.select(HOLDS.c.held_since).where(_of_manifest(HOLDS, manifest))
    ).scalar()  # fmt: skip
    connection.execute(sa.delete(HOLDS).where(_of_manifest(HOLDS, manifest)))
    connection.execute(
        sa.insert(HOLDS).values(
            account=manifest.account,
            resource=manifest.resource,
            window_start=manifest.window_start,
            load_id=manifest.load_id,
            landing_path=staged.landed.path,
            rows_loaded=loss.before.rows,
            rows_extracted=loss.after.rows,
            cost_total_loaded=loss.before.cost_total,
            cost_total_extracted=loss.after.cost_total,
            rows_digest=loss.rows_digest,
            is_final=loss.is_final,
            held_since=min(since or manifest.started_at, manifest.started_at),
            last_extracted_at=manifest.started_at,
            data_version=data_version,
        )
    )
    alert = alerts.Alert(
        kind="held",
        account=manifest.account,
        subject=_subject(manifest),
        detail=sentence(manifest, loss),
        key=(manifest.resource, manifest.window_start.isoformat(), manifest.load_id),
    )
    alerts.raise_alert(connection, alert, manifest.started_at)


def is_held(connection: sa.Connection, manifest: Manifest) -> bool:
    """Return whether the window has a held extract."""
    query = sa.select(sa.func.count()).select_from(HOLDS).where(_of_manifest(HOLDS, manifest))
    return connection.execute(query).scalar_one() > 0


def is_open(connection: sa.Connection, load_id: str) -> bool:
    """Return whether the extract is held, or has rows that are still quarantined."""
    held = sa.select(HOLDS.c.load_id).where(HOLDS.c.load_id == load_id)
    quarantined = sa.select(QUARANTINE.c.load_id).where(
        QUARANTINE.c.load_id == load_id, QUARANTINE.c.resolved_at.is_(None)
    )
    return connection.execute(sa.union(held, quarantined)).first() is not None


def release(connection: sa.Connection, account: str, resource: str, day: date, at: datetime) -> None:
    """Release the hold of the window, if there is one, inside a transaction."""
    query = sa.delete(HOLDS).where(of_window(HOLDS, account, resource, day)).returning(HOLDS.c.load_id)
    if connection.execute(query).first() is not None:
        alerts.resolve(connection, "held", account, f"{resource} {day}", at)


def sentence(manifest: Manifest, loss: Loss) -> str:
    """Describe a hold: the figures of both sides, and what to do."""
    accept = accept_command(manifest)
    if loss.is_final:
        return (
            f"held: {loss.before} are loaded and stay, though fal serves only {loss.after} of this day, "
            f"which ended more than {SERVED_FOR.days} days ago; it is not extracted again. To confirm "
            f"the loaded rows: {accept} --keep --reason TEXT; if rows are really gone: without --keep"
        )
    return (
        f"held: {loss.before} are loaded and stay, though fal now serves {loss.after}; later runs "
        f"extract it again. If the rows are really gone: {accept} --reason TEXT"
    )


def _subject(manifest: Manifest) -> str:
    return f"{manifest.resource} {manifest.window.day}"


def _of_manifest(table: sa.Table, manifest: Manifest) -> sa.ColumnElement[bool]:
    return of_window(table, manifest.account, manifest.resource, manifest.window.day)


# --- ops.acceptances ------------------------------------------------------------------------------


def accepted_rows(connection: sa.Connection | None) -> frozenset[str]:
    """Return the keys of rows that violate fal's contract and that people accepted."""
    if connection is None:
        return frozenset()
    query = sa.select(ACCEPTANCES.c.account, ACCEPTANCES.c.rows_digest).where(
        ACCEPTANCES.c.accepted == "refused"
    )
    return frozenset(acceptance_key(*row) for row in connection.execute(query))


def acceptance_of(connection: sa.Connection, manifest: Manifest, rows_digest: str) -> str | None:
    """Return the decision about exactly these missing rows (`held` or `kept`); None without one."""
    query = sa.select(ACCEPTANCES.c.accepted).where(
        _of_manifest(ACCEPTANCES, manifest), ACCEPTANCES.c.rows_digest == rows_digest
    )
    return connection.execute(query.order_by(ACCEPTANCES.c.accepted_at.desc()).limit(1)).scalar()


def enter(connection: sa.Connection, acceptance: WindowAccepted) -> None:
    """Record an acceptance, inside a transaction."""
    values: dict[str, Any] = {
        name: getattr(acceptance, name)
        for name in acceptance.__struct_fields__
        if name not in ("decided_at", "decided_by")
    }
    values |= {name: Decimal(values[name]) for name in ("cost_total_before", "cost_total_after")}
    connection.execute(
        sa.insert(ACCEPTANCES).values(
            **values, accepted_by=acceptance.decided_by, accepted_at=acceptance.decided_at
        )
    )


def is_refused_window_accepted(connection: sa.Connection, load: sa.RowMapping) -> bool:
    """Return whether the load has rows that a contract rule refuses and a person accepted."""
    day = load["window_start"].astimezone(UTC).date()
    query = sa.select(sa.func.count()).select_from(ACCEPTANCES).where(
        of_window(ACCEPTANCES, load["account"], load["resource"], day),
        ACCEPTANCES.c.accepted == "refused",
    )  # fmt: skip
    return connection.execute(query).scalar_one() > 0
