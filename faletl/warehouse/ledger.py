"""The ledger: fence a lease; find the loads, rows and endpoint ids of windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from faletl.errors import LeaseLostError, UsageError
from faletl.landing.extracts import Receipt
from faletl.resources import RESOURCES, Resource
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.schema import columns_of
from faletl.warehouse.tables import FAILURES, HOLDS, LOADS, QUARANTINE, RAW, UNKNOWN_ENDPOINTS, WAREHOUSE
from faletl.windows import HOUR, Hold, LastExtract, Window

if TYPE_CHECKING:
    from faletl.selection import Asked

UNKNOWN_FOR = timedelta(days=7)
"""How long an endpoint id that fal does not know is not requested again."""

SEEN_WITHIN = timedelta(days=90)
"""Endpoints used in this time before a window are requested for it."""


def fence(lease: Lease, *, changes_data: bool) -> int:
    """Keep the lease until the commit, or raise LeaseLostError; must run inside a transaction.

    Returns the version of the raw tables after the transaction.
    """
    data_version = lease.connection.execute(
        sa.update(WAREHOUSE)
        .where(WAREHOUSE.c.fencing_token == lease.token)
        .values(data_version=WAREHOUSE.c.data_version + int(changes_data))
        .returning(WAREHOUSE.c.data_version)
    ).scalar_one_or_none()
    if data_version is None:
        winner = lease.connection.execute(sa.select(WAREHOUSE.c.holder)).scalar_one()
        raise LeaseLostError(f"a newer run took over the warehouse ({winner}); nothing was written")
    return int(data_version)


def rows_of_windows(resource: Resource, account: str, windows: Iterable[Window]) -> sa.Select[Any]:
    """Select the rows of the windows from raw, whichever loads brought them."""
    conditions = (is_of(resource, account, window) for window in windows)
    return sa.select(RAW[resource.name]).where(sa.or_(sa.false(), *conditions))


def of_window(table: sa.Table, account: str, resource: str, day: date) -> sa.ColumnElement[bool]:
    """Return the condition for rows of an ops table about the window that begins on that UTC day."""
    window = Window.of_day(day)
    return sa.and_(
        table.c.account == account,
        table.c.resource == resource,
        table.c.window_start >= window.start,
        table.c.window_start < window.end,
    )


def is_of(resource: Resource, account: str, window: Window) -> sa.ColumnElement[bool]:
    """Return the condition for raw rows of the window."""
    table = RAW[resource.name]
    is_own = table.c["_account"] == account
    if resource.time is None:
        return sa.and_(is_own, table.c["_snapshot_at"] == window.start)
    day, time = Window.of_day(window.day), table.c[resource.time]
    return sa.and_(is_own, time >= day.start, time < day.end)


def last_extracts(connection: sa.Connection, account: str, resource: str) -> Mapping[date, LastExtract]:
    """Return the newest extract of each loaded day (or day with a snapshot)."""
    loads, holds = LOADS.c, HOLDS.c
    holds_by_day = {
        start.astimezone(UTC).date(): Hold(*columns)
        for start, *columns in connection.execute(
            sa.select(
                holds.window_start, holds.held_since, holds.last_extracted_at, holds.is_final
            ).where(holds.account == account, holds.resource == resource)
        )
    }
    rows = connection.execute(
        sa.select(
            loads.window_start, loads.last_read_at, loads.is_provisional, loads.whole_catalogue_at,
            loads.changed_at,
        )
        .where(loads.account == account, loads.resource == resource, loads.is_current)
        .order_by(loads.last_fencing_token, loads.window_start)
    )  # fmt: skip
    return {
        (day := start.astimezone(UTC).date()): LastExtract(
            read_at, is_provisional, whole_catalogue_at, changed_at, holds_by_day.get(day)
        )
        for start, read_at, is_provisional, whole_catalogue_at, changed_at in rows
    }


def changed_days(connection: sa.Connection, since: int, token: int) -> Mapping[str, set[date]]:
    """Return, per resource, the UTC days that changed after version `since` of the raw tables.

    Included are days that were held or refused after it, and days with rows that were quarantined or
    resolved under a later lease than `token`.
    """
    quarantine = QUARANTINE.c
    rows = connection.execute(
        sa.union(
            *(
                sa.select(table.c.resource, table.c.window_start).where(table.c.data_version > since)
                for table in (LOADS, HOLDS, FAILURES)
            ),
            sa.select(quarantine.resource, quarantine.window_start).where(
                quarantine.fencing_token > token
            ),
        )
    )
    changed: dict[str, set[date]] = {}
    for resource, start in rows:
        changed.setdefault(resource, set()).add(start.astimezone(UTC).date())
    return changed


def pages_per_window(connection: sa.Connection, account: str) -> Mapping[str, float]:
    """Return the average number of pages that one extract of a loaded window requests, per resource.

    The control total after the rows is not counted. If a window has several pages, a total is requested
    before them as well; where fal gives it, the first page is then requested a second time. Where fal
    refuses it, the day is requested in parts, twice, with about one more page per halved part.
    """
    has_total = LOADS.c.proof == "summary"
    has_several_pages = sa.and_(
        LOADS.c.pages > 1, LOADS.c.proof != "none", LOADS.c.is_provisional.is_(False)
    )
    is_halved = sa.and_(has_several_pages, LOADS.c.proof == "two walks", LOADS.c.control_total.is_(None))
    walked = LOADS.c.pages * sa.case((is_halved, 3), (LOADS.c.proof == "two walks", 2), else_=1)
    walked += sa.case(
        (is_halved, 0), (sa.and_(has_several_pages, has_total), 2), (has_several_pages, 1), else_=0
    )
    rows = connection.execute(
        sa.select(LOADS.c.resource, sa.func.sum(walked), sa.func.count())
        .where(LOADS.c.account == account, LOADS.c.is_current)
        .group_by(LOADS.c.resource)
    )
    return {resource: max(1.0, int(pages) / count) for resource, pages, count in rows}


def current_loads(warehouse: Warehouse, selection: Asked) -> list[sa.RowMapping]:
    """Return the current rows of ops.loads that `selection` covers, by resource, oldest first.

    Raises:
        UsageError: there is no warehouse yet.
    """
    with warehouse.reading() as connection:
        if connection is None:
            raise UsageError("nothing is loaded yet; run faletl run first")
        result = connection.execute(
            sa.select(LOADS).where(LOADS.c.is_current).order_by(LOADS.c.window_start, LOADS.c.account)
        )
        loads = [
            load
            for load in result.mappings()
            if selection.includes(load["resource"], Window(load["window_start"], load["window_start"]))
        ]
    order = list(RESOURCES)
    return sorted(loads, key=lambda load: order.index(load["resource"]))


def last_extract_times(connection: sa.Connection) -> Mapping[tuple[str, str, date], datetime]:
    """Return when each loaded or held window (account, resource, UTC day) was last extracted."""
    columns = (LOADS.c.account, LOADS.c.resource, LOADS.c.window_start, LOADS.c.last_read_at)
    loads = sa.select(*columns).where(LOADS.c.is_current)
    rows = connection.execute(loads.order_by(LOADS.c.last_fencing_token, LOADS.c.window_start))
    last = {(a, r, start.astimezone(UTC).date()): extracted_at for a, r, start, extracted_at in rows}
    columns = (HOLDS.c.account, HOLDS.c.resource, HOLDS.c.window_start, HOLDS.c.last_extracted_at)
    for account, resource, start, extracted_at in connection.execute(sa.select(*columns)):
        key = (account, resource, start.astimezone(UTC).date())
        last[key] = max(last.get(key, extracted_at), extracted_at)
    return last


@dataclass(frozen=True, slots=True)
class KnownIds:
    """Endpoint ids for one window: used or loaded, in fal's newest catalogue, unknown to fal."""

    used_or_loaded: frozenset[str] = frozenset()
    catalogue: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()


def known_ids(
    connection: sa.Connection, account: str, resource: Resource, window: Window, now: datetime
) -> KnownIds:
    """Return the endpoint ids that the warehouse knows for a window.

    These are the ids used in the window or in `SEEN_WITHIN` before it, the ids loaded for the window (or
    in the newest snapshot), fal's catalogue, and the ids that fal answered with 404 in `UNKNOWN_FOR`.
    """
    usage, table = RAW["usage"], RAW[resource.name]
    used = sa.select(usage.c.endpoint_id).where(
        usage.c["_account"] == account,
        usage.c.bucket >= window.start - SEEN_WITHIN,
        usage.c.bucket < max(window.end, window.start + HOUR),
    )
    if resource.time is None:
        loaded = _newest_snapshot_ids(table, account)
    else:
        day, time = Window.of_day(window.day), table.c[resource.time]
        loaded = sa.select(table.c.endpoint_id).where(
            table.c["_account"] == account, time >= day.start, time < day.end
        )
    unknown = sa.select(UNKNOWN_ENDPOINTS.c.endpoint_id).where(
        UNKNOWN_ENDPOINTS.c.account == account,
        UNKNOWN_ENDPOINTS.c.resource == resource.name,
        UNKNOWN_ENDPOINTS.c.seen_at > now - UNKNOWN_FOR,
        UNKNOWN_ENDPOINTS.c.seen_at <= now,
    )
    return KnownIds(
        *(
            frozenset(connection.execute(query).scalars())
            for query in (
                sa.union(used, loaded),
                _newest_snapshot_ids(RAW["models"], account),
                unknown,
            )
        )
    )


def _newest_snapshot_ids(table: sa.Table, account: str) -> sa.Select[Any]:
    newest = sa.select(sa.func.max(table.c["_snapshot_at"])).where(table.c["_account"] == account)
    return sa.select(table.c.endpoint_id).where(
        table.c["_account"] == account, table.c["_snapshot_at"] == newest.scalar_subquery()
    )


@dataclass(frozen=True, slots=True)
class Ledger:
    """The state of landed extracts according to ops; empty for a warehouse that cannot be read.

    `receipts` are by ids of extracts: those that were loaded, and the newest that confirmed a load.
    `needed` are the loads whose landed pages are needed to restore rows or restatements, `held` the
    held extracts, `thinned` the loads about to be thinned out (see faletl/operations/maintain.py).
    """

    warehouse_id: str = ""
    receipts: Mapping[str, Receipt] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    thinned: frozenset[str] = frozenset()


def read_ledger(connection: sa.Connection, day: date | None = None) -> Ledger:
    """Return the ledger, of all days or of one UTC day."""
    loads = LOADS.c
    is_older = loads.last_load_id.name not in columns_of(connection, LOADS)
    query = sa.select(
        loads.load_id,
        loads.load_id.label("last_load_id") if is_older else loads.last_load_id,
        loads.fencing_token, loads.last_fencing_token, loads.loaded_at, loads.last_read_at,
        loads.is_current, loads.is_provisional,
    )  # fmt: skip
    if day is not None:
        window = Window.of_day(day)
        query = query.where(loads.window_start >= window.start, loads.window_start < window.end)
    rows = connection.execute(query).all()
    in_raw = _loads_still_in_raw(connection)
    own_id, held_receipts = "", dict[str, Receipt]()
    if columns_of(connection, HOLDS):  # a warehouse of schema 5
        own_id = connection.execute(sa.select(WAREHOUSE.c.warehouse_id)).scalar_one()
        token = connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one()
        held_receipts = {
            load_id: Receipt(token, at, "held", own_id)
            for load_id, at in connection.execute(sa.select(HOLDS.c.load_id, HOLDS.c.last_extracted_at))
        }
    confirmed = {
        row.last_load_id: Receipt(row.last_fencing_token, row.last_read_at, "unchanged", own_id)
        for row in rows
    }
    loaded = {row.load_id: Receipt(row.fencing_token, row.loaded_at, "loaded", own_id) for row in rows}
    return Ledger(
        warehouse_id=own_id,
        receipts=held_receipts | confirmed | loaded,
        needed=frozenset(
            row.load_id
            for row in rows
            if row.is_current or not row.is_provisional or row.load_id in in_raw
        ),
        held=frozenset(held_receipts),
    )


def _loads_still_in_raw(connection: sa.Connection) -> set[str]:
    """Return loads with rows in raw that later extracts of their day did not request again."""
    load_ids = set[str]()
    for name, resource in RESOURCES.items():
        is_in_parts = resource.ids_per_call is not None and resource.window == "day"
        if is_in_parts and columns_of(connection, RAW[name]):
            load_ids |= set(connection.execute(sa.select(RAW[name].c["_load_id"]).distinct()).scalars())
    return load_ids
