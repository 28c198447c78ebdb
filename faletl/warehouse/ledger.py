"""What ops says: the newest token, what is loaded of which window, which ids are known."""

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
"""For how long an endpoint id that fal does not know is not asked again."""


SEEN_WITHIN = timedelta(days=90)
"""Endpoints used within so many days before a window are asked for."""


def fence(lease: Lease, *, changes_data: bool) -> int:
    """Inside a transaction: hold on to the lease until the commit, or raise LeaseLostError.

    Returns the version of the raw tables that the transaction makes (or leaves).
    """
    kept = lease.connection.execute(
        sa.update(WAREHOUSE)
        .where(WAREHOUSE.c.fencing_token == lease.token)
        .values(data_version=WAREHOUSE.c.data_version + int(changes_data))
        .returning(WAREHOUSE.c.data_version)
    ).scalar_one_or_none()
    if kept is None:
        winner = lease.connection.execute(sa.select(WAREHOUSE.c.holder)).scalar_one()
        raise LeaseLostError(f"a newer run took over the warehouse ({winner}); nothing was written")
    return int(kept)


def rows_of_windows(resource: Resource, account: str, windows: Iterable[Window]) -> sa.Select[Any]:
    """What raw holds of the windows, whichever loads brought it."""
    held = (is_of(resource, account, window) for window in windows)
    return sa.select(RAW[resource.name]).where(sa.or_(sa.false(), *held))


def of_window(table: sa.Table, account: str, resource: str, day: date) -> sa.ColumnElement[bool]:
    """Where a table of ops speaks of the window that begins on that UTC day."""
    window = Window.of_day(day)
    return sa.and_(
        table.c.account == account,
        table.c.resource == resource,
        table.c.window_start >= window.start,
        table.c.window_start < window.end,
    )


def is_of(resource: Resource, account: str, window: Window) -> sa.ColumnElement[bool]:
    table = RAW[resource.name]
    mine = table.c["_account"] == account
    if resource.time is None:
        return sa.and_(mine, table.c["_snapshot_at"] == window.start)
    day, time = Window.of_day(window.day), table.c[resource.time]
    return sa.and_(mine, time >= day.start, time < day.end)


def reads_by_day(connection: sa.Connection, account: str, resource: str) -> Mapping[date, LastExtract]:
    """The newest extract of each loaded day (or day with a snapshot)."""
    loads, held = LOADS.c, HOLDS.c
    held_days = {
        start.astimezone(UTC).date(): Hold(*hold)
        for start, *hold in connection.execute(
            sa.select(held.window_start, held.held_since, held.last_extracted_at, held.is_final).where(
                held.account == account, held.resource == resource
            )
        )
    }
    found = connection.execute(
        sa.select(
            loads.window_start, loads.last_read_at, loads.is_provisional, loads.whole_catalogue_at,
            loads.changed_at,
        )
        .where(loads.account == account, loads.resource == resource, loads.is_current)
        .order_by(loads.last_fencing_token, loads.window_start)
    )  # fmt: skip
    return {
        (day := start.astimezone(UTC).date()): LastExtract(
            read_at, is_provisional, whole_catalogue_at, changed_at, held_days.get(day)
        )
        for start, read_at, is_provisional, whole_catalogue_at, changed_at in found
    }


def changed_days(connection: sa.Connection, since: int, token: int) -> Mapping[str, set[date]]:
    """Per resource the UTC days whose rows changed after that version of the raw tables.

    With them those that were held or refused since, and those of which rows were quarantined, or
    resolved, under a later lease than `token`.
    """
    aside = QUARANTINE.c
    found = connection.execute(
        sa.union(
            *(
                sa.select(table.c.resource, table.c.window_start).where(table.c.data_version > since)
                for table in (LOADS, HOLDS, FAILURES)
            ),
            sa.select(aside.resource, aside.window_start).where(aside.fencing_token > token),
        )
    )
    changed: dict[str, set[date]] = {}
    for resource, start in found:
        changed.setdefault(resource, set()).add(start.astimezone(UTC).date())
    return changed


def pages_per_window(connection: sa.Connection, account: str) -> Mapping[str, float]:
    """How many pages a read of each resource's loaded windows asks for on average.

    The control total behind the rows is not counted. Where there are several pages, one in front of
    them is asked for, and if fal tells it, the first page once more behind it. If fal refuses it, the
    day is asked for in parts, twice, and for about one page more each time that a part is halved.
    """
    is_told = LOADS.c.proof == "summary"
    is_framed = sa.and_(LOADS.c.pages > 1, LOADS.c.proof != "none", LOADS.c.is_provisional.is_(False))
    is_halved = sa.and_(is_framed, LOADS.c.proof == "two walks", LOADS.c.control_total.is_(None))
    walked = LOADS.c.pages * sa.case((is_halved, 3), (LOADS.c.proof == "two walks", 2), else_=1)
    walked += sa.case((is_halved, 0), (sa.and_(is_framed, is_told), 2), (is_framed, 1), else_=0)
    found = connection.execute(
        sa.select(LOADS.c.resource, sa.func.sum(walked), sa.func.count())
        .where(LOADS.c.account == account, LOADS.c.is_current)
        .group_by(LOADS.c.resource)
    )
    return {resource: max(1.0, int(pages) / count) for resource, pages, count in found}


def current_loads(warehouse: Warehouse, asked: Asked) -> list[sa.RowMapping]:
    """The rows of ops.loads that hold what is asked for (default: all): by resource, oldest first.

    Raises:
        UsageError: there is no warehouse yet.
    """
    with warehouse.reading() as connection:
        if connection is None:
            raise UsageError("nothing is loaded yet; run faletl run first")
        found = connection.execute(
            sa.select(LOADS).where(LOADS.c.is_current).order_by(LOADS.c.window_start, LOADS.c.account)
        )
        loads = [
            load
            for load in found.mappings()
            if asked.includes(load["resource"], Window(load["window_start"], load["window_start"]))
        ]
    order = list(RESOURCES)
    return sorted(loads, key=lambda load: order.index(load["resource"]))


def loaded_reads(connection: sa.Connection) -> Mapping[tuple[str, str, date], datetime]:
    """When each window (account, resource, UTC day) was last extracted: for what is loaded, or held."""
    columns = (LOADS.c.account, LOADS.c.resource, LOADS.c.window_start, LOADS.c.last_read_at)
    loads = sa.select(*columns).where(LOADS.c.is_current)
    found = connection.execute(loads.order_by(LOADS.c.last_fencing_token, LOADS.c.window_start))
    last = {(a, r, start.astimezone(UTC).date()): read for a, r, start, read in found}
    columns = (HOLDS.c.account, HOLDS.c.resource, HOLDS.c.window_start, HOLDS.c.last_extracted_at)
    for account, resource, start, extracted_at in connection.execute(sa.select(*columns)):
        key = (account, resource, start.astimezone(UTC).date())
        last[key] = max(last.get(key, extracted_at), extracted_at)
    return last


@dataclass(frozen=True, slots=True)
class KnownIds:
    """Endpoint ids for one window: worth asking for, in fal's newest catalogue, unknown to fal."""

    used_or_held: frozenset[str] = frozenset()
    catalogue: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()


def known_ids(
    connection: sa.Connection, account: str, resource: Resource, window: Window, now: datetime
) -> KnownIds:
    """What the warehouse knows of endpoint ids: those used in the window or in `SEEN_WITHIN` before
    it, those that the window (or the newest snapshot) holds, and those fal lately answered 404 for.
    """
    usage, table = RAW["usage"], RAW[resource.name]
    used = sa.select(usage.c.endpoint_id).where(
        usage.c["_account"] == account,
        usage.c.bucket >= window.start - SEEN_WITHIN,
        usage.c.bucket < max(window.end, window.start + HOUR),
    )
    if resource.time is None:
        held = _newest_snapshot_ids(table, account)
    else:
        day, time = Window.of_day(window.day), table.c[resource.time]
        held = sa.select(table.c.endpoint_id).where(
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
                sa.union(used, held),
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
    """What ops says of landed extracts; of a warehouse that cannot be read, nothing.

    `receipts` are by the ids of extracts: of loads, and of the newest extract that found the rows of
    one. `needed` are the loads without whose landed pages rows or restatements would be lost, `held` the
    extracts that are held, `thinned` the loads that are about to be thinned out (see
    faletl/operations/maintain.py).
    """

    warehouse_id: str = ""
    receipts: Mapping[str, Receipt] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    thinned: frozenset[str] = frozenset()


def read_ledger(connection: sa.Connection, day: date | None = None) -> Ledger:
    """The ledger, or that of one UTC day. Raw depends on what is needed, and so do restatements."""
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
    found = connection.execute(query).all()
    standing = _standing_loads(connection)
    own_id, held = "", dict[str, Receipt]()
    if columns_of(connection, HOLDS):  # a warehouse of schema 5
        own_id = connection.execute(sa.select(WAREHOUSE.c.warehouse_id)).scalar_one()
        token = connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one()
        held = {
            load_id: Receipt(token, at, "held", own_id)
            for load_id, at in connection.execute(sa.select(HOLDS.c.load_id, HOLDS.c.last_extracted_at))
        }
    confirmed = {
        one.last_load_id: Receipt(one.last_fencing_token, one.last_read_at, "unchanged", own_id)
        for one in found
    }
    loaded = {one.load_id: Receipt(one.fencing_token, one.loaded_at, "loaded", own_id) for one in found}
    return Ledger(
        warehouse_id=own_id,
        receipts=held | confirmed | loaded,
        needed=frozenset(
            one.load_id
            for one in found
            if one.is_current or not one.is_provisional or one.load_id in standing
        ),
        held=frozenset(held),
    )


def _standing_loads(connection: sa.Connection) -> set[str]:
    """Loads that brought rows which no later read of their day asked for again."""
    standing = set[str]()
    for name, resource in RESOURCES.items():
        is_in_parts = resource.ids_per_call is not None and resource.window == "day"
        if is_in_parts and columns_of(connection, RAW[name]):
            standing |= set(connection.execute(sa.select(RAW[name].c["_load_id"]).distinct()).scalars())
    return standing
