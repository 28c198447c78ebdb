"""Load: replace a window of a raw table in one transaction with its row in ops.loads.

There is no append path. A read that found the same rows replaces nothing. A read that was planned
before somebody else loaded the window replaces nothing either: it may be the older one, whatever the
clocks say.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import FaletlError, LeaseLostError, WarehouseError
from faletl.landing import Manifest, relative_path
from faletl.resources import Resource
from faletl.staging import Staged
from faletl.warehouse import Lease, Warehouse
from faletl.warehouse.tables import FAILURES, HORIZONS, LOADS, RAW, UNKNOWN_ENDPOINTS, WAREHOUSE
from faletl.windows import DAY, Read, Window

Outcome = Literal["loaded", "unchanged", "superseded"]
"""What became of a window: replaced; found to hold the same rows; or left as a later run had it."""

UNKNOWN_FOR = timedelta(days=7)
"""For how long an endpoint id that fal does not know is not asked again."""

SEEN_WITHIN = timedelta(days=90)
"""Endpoints used within so many days are asked for their price."""


def fence(lease: Lease, *, changes_data: bool) -> None:
    """Inside a transaction: hold on to the lease until the commit, or raise LeaseLostError."""
    kept = lease.connection.execute(
        sa.update(WAREHOUSE)
        .where(WAREHOUSE.c.fencing_token == lease.token)
        .values(data_version=WAREHOUSE.c.data_version + int(changes_data))
        .returning(WAREHOUSE.c.fencing_token)
    ).all()
    if not kept:
        winner = lease.connection.execute(sa.select(WAREHOUSE.c.holder)).scalar_one()
        raise LeaseLostError(f"a newer run took over the warehouse ({winner}); nothing was written")


def replace_window(settings: Settings, warehouse: Warehouse, lease: Lease, staged: Staged) -> Outcome:
    """Make the raw table hold exactly the staged rows for their window; all or nothing.

    Raises:
        LeaseLostError: a newer run took over; nothing is changed.
        WarehouseError: the database did not keep what it was given; nothing is changed.
    """
    manifest = staged.landed.manifest
    window = manifest.window
    try:
        with lease.connection.begin():
            return _replace(settings, warehouse, lease, staged)
    except sa.exc.DBAPIError as error:
        raise WarehouseError(
            f"the warehouse refused the load: {str(error.orig).splitlines()[0]}",
            resource=manifest.resource, window=str(window),
        ) from None  # fmt: skip
    except FaletlError as error:
        raise error.at(resource=manifest.resource, window=str(window)) from None


def _replace(settings: Settings, warehouse: Warehouse, lease: Lease, staged: Staged) -> Outcome:
    manifest, connection = staged.landed.manifest, lease.connection
    held = connection.execute(_current(staged.resource, manifest)).mappings().first()
    if held is not None and held["load_id"] == manifest.load_id:
        return "unchanged"
    if held is not None and held["last_fencing_token"] > manifest.fencing_token:
        return "superseded"
    is_same = held is not None and held["digest"] == staged.digest
    fence(lease, changes_data=not is_same)
    _forget_failure(connection, manifest)
    _widen_horizon(connection, manifest)
    _remember_unknown(connection, manifest)
    if held is not None and is_same:
        connection.execute(
            sa.update(LOADS)
            .where(LOADS.c.load_id == held["load_id"])
            .values(
                last_read_at=manifest.started_at,
                last_fencing_token=lease.token,
                window_end=manifest.window_end,
                proof=staged.proof,
                is_provisional=manifest.window.is_provisional,
            )
        )
        return "unchanged"
    _delete_window(connection, staged.resource, manifest)
    _insert(warehouse, lease, staged)
    _enter(settings, lease, staged)
    return "loaded"


def _current(resource: Resource, manifest: Manifest) -> sa.Select[Any]:
    """The load that holds this window now; for a snapshot, the newest one of the same UTC day."""
    start = manifest.window_start.replace(hour=0, minute=0, second=0, microsecond=0)
    is_same_window = sa.and_(
        LOADS.c.account == manifest.account,
        LOADS.c.resource == manifest.resource,
        LOADS.c.window_start >= start,
        LOADS.c.window_start < start + DAY,
        LOADS.c.is_current,
    )
    if resource.every_run:  # a level: each instant of it stands for itself
        is_same_window = sa.and_(is_same_window, LOADS.c.window_start == manifest.window_start)
    return (
        sa.select(LOADS)
        .where(is_same_window)
        .order_by(LOADS.c.last_fencing_token.desc(), LOADS.c.window_start.desc())
        .limit(1)
    )


def _delete_window(connection: sa.Connection, resource: Resource, manifest: Manifest) -> None:
    table, start = RAW[resource.name], manifest.window_start
    if resource.time is None:
        is_inside = table.c["_snapshot_at"] == start
    else:
        time = table.c[resource.time]
        is_inside = sa.and_(time >= start, time < start + DAY)
    connection.execute(sa.delete(table).where(table.c["_account"] == manifest.account, is_inside))
    connection.execute(
        sa.update(LOADS)
        .where(
            LOADS.c.account == manifest.account,
            LOADS.c.resource == manifest.resource,
            LOADS.c.window_start == start,
            LOADS.c.is_current,
        )
        .values(is_current=False)
    )


def _insert(warehouse: Warehouse, lease: Lease, staged: Staged) -> None:
    """Insert in bulk, then read back what the database now holds: a count and a sum."""
    table = RAW[staged.resource.name]
    warehouse.take_in(lease.connection, table, staged.path)
    cost = sa.func.sum(table.c.cost_total) if "cost_total" in table.c else sa.literal(0)
    rows, total = lease.connection.execute(
        sa.select(sa.func.count(), sa.func.coalesce(cost, 0)).where(
            table.c["_load_id"] == staged.landed.manifest.load_id
        )
    ).one()
    if rows != staged.rows or Decimal(total) != Decimal(staged.cost_total):
        raise WarehouseError(
            f"the warehouse holds {rows} rows and {total} after loading {staged.rows} rows and "
            f"{staged.cost_total}; the load was undone"
        )


def _enter(settings: Settings, lease: Lease, staged: Staged) -> None:
    manifest = staged.landed.manifest
    lease.connection.execute(
        sa.insert(LOADS).values(
            load_id=manifest.load_id,
            run_id=manifest.run_id,
            account=manifest.account,
            resource=manifest.resource,
            window_start=manifest.window_start,
            window_end=manifest.window_end,
            pages=len(manifest.pages("rows")),
            rows=staged.rows,
            cost_total=Decimal(staged.cost_total),
            digest=staged.digest,
            proof=staged.proof,
            dropped_rows=staged.dropped_rows,
            doubtful_rows=staged.doubtful_rows,
            rounded_amounts=staged.rounded_amounts,
            fencing_token=lease.token,
            last_fencing_token=lease.token,
            landing_path=relative_path(settings, staged.landed.folder),
            read_at=manifest.started_at,
            last_read_at=manifest.started_at,
            loaded_at=datetime.now(UTC),
            is_current=True,
            is_provisional=manifest.window.is_provisional,
        )
    )


def _widen_horizon(connection: sa.Connection, manifest: Manifest) -> None:
    """Keep from which day on the ledger is to be complete, should the run end before it is."""
    if manifest.window.is_snapshot:
        return
    same = sa.and_(HORIZONS.c.account == manifest.account, HORIZONS.c.resource == manifest.resource)
    known = connection.execute(sa.select(HORIZONS.c.first_day).where(same)).scalar()
    if known is None or manifest.planned_from < known:
        connection.execute(sa.delete(HORIZONS).where(same))
        connection.execute(
            sa.insert(HORIZONS).values(
                account=manifest.account,
                resource=manifest.resource,
                first_day=manifest.planned_from,
            )
        )


def _forget_failure(connection: sa.Connection, manifest: Manifest) -> None:
    connection.execute(
        sa.delete(FAILURES).where(
            FAILURES.c.account == manifest.account,
            FAILURES.c.resource == manifest.resource,
            FAILURES.c.window_start >= Window.of_day(manifest.window.day).start,
            FAILURES.c.window_start < Window.of_day(manifest.window.day).end,
        )
    )


def _remember_unknown(connection: sa.Connection, manifest: Manifest) -> None:
    table = UNKNOWN_ENDPOINTS
    asked = {
        endpoint for call in manifest.calls for endpoint in call.query.get("endpoint_id", [])
    } | set(manifest.unknown_ids)
    if not asked:
        return
    same = sa.and_(table.c.account == manifest.account, table.c.resource == manifest.resource)
    connection.execute(sa.delete(table).where(same, table.c.endpoint_id.in_(sorted(asked))))
    for endpoint in manifest.unknown_ids:
        connection.execute(
            sa.insert(table).values(
                account=manifest.account,
                resource=manifest.resource,
                endpoint_id=endpoint,
                seen_at=manifest.started_at,
            )
        )


def record_failure(
    lease: Lease, error: FaletlError, *, account: str, resource: str, window: Window, run_id: str
) -> None:
    """Keep the failure of a window for `faletl status`, in place of an older one."""
    with lease.connection.begin():
        fence(lease, changes_data=False)
        lease.connection.execute(
            sa.delete(FAILURES).where(
                FAILURES.c.account == account,
                FAILURES.c.resource == resource,
                FAILURES.c.window_start == window.start,
            )
        )
        lease.connection.execute(
            sa.insert(FAILURES).values(
                run_id=run_id,
                account=account,
                resource=resource,
                window_start=window.start,
                error=type(error).__name__,
                message=str(error),
                failed_at=datetime.now(UTC),
            )
        )


# --- What a run asks of the ledger ----------------------------------------------------------------


def reads_by_day(connection: sa.Connection, account: str, resource: str) -> Mapping[date, Read]:
    """The newest read of each loaded day (or day with a snapshot)."""
    found = connection.execute(
        sa.select(LOADS.c.window_start, LOADS.c.last_read_at, LOADS.c.is_provisional)
        .where(LOADS.c.account == account, LOADS.c.resource == resource, LOADS.c.is_current)
        .order_by(LOADS.c.last_fencing_token, LOADS.c.window_start)
    )
    return {start.astimezone(UTC).date(): Read(read_at, flag) for start, read_at, flag in found}


def horizons(connection: sa.Connection, account: str) -> Mapping[str, date]:
    """Per resource the day from which on its ledger is to be complete."""
    found = sa.select(HORIZONS.c.resource, HORIZONS.c.first_day).where(HORIZONS.c.account == account)
    return {resource: first_day for resource, first_day in connection.execute(found)}  # noqa: C416


def loaded_reads(connection: sa.Connection) -> Mapping[tuple[str, str, date], datetime]:
    """When each loaded window (account, resource, UTC day) was last read."""
    found = connection.execute(
        sa.select(LOADS.c.account, LOADS.c.resource, LOADS.c.window_start, LOADS.c.last_read_at)
        .where(LOADS.c.is_current)
        .order_by(LOADS.c.last_fencing_token, LOADS.c.window_start)
    )
    return {(a, r, start.astimezone(UTC).date()): read for a, r, start, read in found}


def endpoint_ids(
    connection: sa.Connection, account: str, resource: str, now: datetime
) -> tuple[set[str], set[str]]:
    """The ids worth asking for, and those that fal lately said it does not know.

    Worth asking for are the newest catalogue, what was used in `SEEN_WITHIN`, and what the newest
    snapshot in the table itself holds.
    """
    usage = RAW["usage"]
    known = sa.union(
        sa.select(usage.c.endpoint_id).where(
            usage.c["_account"] == account, usage.c.bucket >= now - SEEN_WITHIN
        ),
        *(_newest_snapshot_ids(RAW[name], account) for name in ("models", resource)),
    )
    unknown = sa.select(UNKNOWN_ENDPOINTS.c.endpoint_id).where(
        UNKNOWN_ENDPOINTS.c.account == account,
        UNKNOWN_ENDPOINTS.c.resource == resource,
        UNKNOWN_ENDPOINTS.c.seen_at > now - UNKNOWN_FOR,
    )
    return set(connection.execute(known).scalars()), set(connection.execute(unknown).scalars())


def _newest_snapshot_ids(table: sa.Table, account: str) -> sa.Select[Any]:
    newest = sa.select(sa.func.max(table.c["_snapshot_at"])).where(table.c["_account"] == account)
    return sa.select(table.c.endpoint_id).where(
        table.c["_account"] == account, table.c["_snapshot_at"] == newest.scalar_subquery()
    )
