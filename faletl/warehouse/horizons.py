"""Horizons: the first UTC day to load of each account and resource.

A run stores the first day that was ever asked for before it asks fal anything, so that a run killed at
its first request loses nothing. From then on, the horizon alone decides which days are due: neither a
load nor a rebuild moves it. While the label of a key is unknown, the horizon is stored under the
fingerprint of the key (faletl/line/accounts.py); it moves to the label in the transaction that binds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from faletl.config import FINGERPRINT, Settings
from faletl.errors import UsageError
from faletl.landing import decisions
from faletl.landing.decisions import HorizonSet
from faletl.resources import RESOURCES
from faletl.warehouse.ledger import fence
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import HORIZONS
from faletl.windows import FIRST_DAY, refuse_odd_day

if TYPE_CHECKING:
    from faletl.selection import Asked

BY_DAY = tuple(name for name, resource in RESOURCES.items() if resource.window == "day")
"""Names of the resources that have a horizon; a snapshot is always of now."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """The first day to load of a resource.

    It `is_decided` once a run without dates, or `faletl horizon`, has set it. Until then, the next such
    run may move it back by FALETL_FIRST_DAYS.
    """

    first_day: date
    is_decided: bool = False


Horizons = Mapping[str, Horizon]
"""Horizons by name of the resource."""


def of_owner(connection: sa.Connection, owner: str) -> Horizons:
    """Return the horizons of a label, or of a key by its fingerprint."""
    table = HORIZONS.c
    rows = connection.execute(
        sa.select(table.resource, table.first_day, table.is_decided).where(table.account == owner)
    )
    return {name: Horizon(first_day, bool(is_decided)) for name, first_day, is_decided in rows}


def moved(known: Horizons, owner: str, selection: Asked, now: datetime, first_days: int) -> Horizons:
    """Return the horizons after `selection` is planned at `now`; `first_days` is FALETL_FIRST_DAYS.

    Named days move a horizon back, never forward. So does the first run of a label without dates. A run
    with an unknown key does so only if the key has no horizon yet, because the label may be older than
    the key. A horizon after tomorrow was set by a clock that was ahead, and is ignored.
    """
    tomorrow = now.date() + timedelta(days=1)
    known = {name: row for name, row in known.items() if row.first_day <= tomorrow}
    recent = max(FIRST_DAY, now.date() - timedelta(days=first_days))
    names = [name for name in BY_DAY if not selection.resources or name in selection.resources]
    is_pending = owner.startswith(FINGERPRINT)
    after = {
        name: _moved(known.get(name), selection.start, recent, is_pending=is_pending) for name in names
    }
    return {**known, **after}


def _moved(row: Horizon | None, start: date | None, recent: date, *, is_pending: bool) -> Horizon:
    if row is None:
        return Horizon(recent, is_decided=True) if start is None else Horizon(start)
    if start is None:
        if row.is_decided or is_pending:
            return row
        return Horizon(min(row.first_day, recent), is_decided=True)
    return Horizon(min(start, row.first_day), is_decided=row.is_decided and not is_pending)


def merged(known: Horizons, pending: Horizons) -> Horizons:
    """Return the horizons of a label after it takes over those of its key.

    A run without dates, made with the key alone, does not move a horizon that the label has decided.
    """
    after = dict(known)
    for name, row in pending.items():
        own = known.get(name)
        if own is None:
            after[name] = row
        elif not (own.is_decided and row.is_decided):
            first_day = min(own.first_day, row.first_day)
            after[name] = Horizon(first_day, own.is_decided or row.is_decided)
    return after


def remember(
    settings: Settings, warehouse: Warehouse, owner: str, selection: Asked, now: datetime
) -> Horizons | None:
    """Store the horizons of `owner` that result from `selection`; create the warehouse if necessary.

    Returns the horizons from before; None if nothing changed, which is the usual case.

    Raises:
        WarehouseError, SettingsError, StorageError: warehouse or landing folder cannot be written.
    """
    with warehouse.reading() as connection:
        known = of_owner(connection, owner) if connection is not None else {}
    if moved(known, owner, selection, now, settings.first_days) == known:
        return None
    with warehouse.lease("faletl, which writes the first day asked for") as lease, lease.transaction():
        known = of_owner(lease.connection, owner)
        write(settings, lease, owner, moved(known, owner, selection, now, settings.first_days))
    return known


def put_back(settings: Settings, warehouse: Warehouse, owner: str, before: Horizons) -> None:
    """Undo `remember` for a run that was refused: wrong use changes nothing."""
    with warehouse.lease("faletl, which was refused") as lease, lease.transaction():
        write(settings, lease, owner, before)


def write(settings: Settings, lease: Lease, owner: str, rows: Horizons) -> None:
    """Replace all horizons of `owner`, and record the decision, inside a transaction."""
    fence(lease, changes_data=False)
    replace(lease.connection, owner, rows)
    decisions.record(settings, _decision(settings, owner, rows))


def replace(connection: sa.Connection, owner: str, rows: Horizons) -> None:
    """Replace all horizons of `owner`, inside a transaction."""
    connection.execute(sa.delete(HORIZONS).where(HORIZONS.c.account == owner))
    if rows:
        connection.execute(
            sa.insert(HORIZONS).values(
                [
                    {
                        "account": owner,
                        "resource": name,
                        "first_day": row.first_day,
                        "is_decided": row.is_decided,
                    }
                    for name, row in sorted(rows.items())
                ]
            )
        )


def _decision(settings: Settings, owner: str, rows: Horizons) -> HorizonSet:
    return HorizonSet(
        decided_at=decisions.next_instant(settings),
        decided_by=decisions.user_name(),
        account=owner,
        first_days={name: row.first_day for name, row in sorted(rows.items())},
        decided=sorted(name for name, row in rows.items() if row.is_decided),
    )


def decided(decision: HorizonSet) -> Horizons:
    """Return the horizons that the decision recorded."""
    return {
        name: Horizon(first_day, name in decision.decided)
        for name, first_day in decision.first_days.items()
    }


def refuse_odd(day: date, resources: Collection[str]) -> None:
    """Raise UsageError for an impossible first day, or a resource without a horizon."""
    refuse_odd_day("--set", day)
    if without_days := sorted(set(resources) - set(BY_DAY)):
        raise UsageError(
            f"{without_days[0]} is a snapshot of now and has no horizon; choose from {', '.join(BY_DAY)}"
        )


def decide(settings: Settings, lease: Lease, owner: str, day: date, resources: Collection[str]) -> None:
    """Set the first day of these resources (default: all with days), inside a transaction.

    Loaded days before it stay unchanged, and are not extracted again.
    """
    chosen = {name: Horizon(day, is_decided=True) for name in resources or BY_DAY}
    write(settings, lease, owner, {**of_owner(lease.connection, owner), **chosen})


def all_horizons(connection: sa.Connection) -> Iterable[tuple[str, str, date]]:
    """Return owner, resource and first day of each horizon: labels in order, then keys without one."""
    table = HORIZONS.c
    rows = connection.execute(sa.select(table.account, table.resource, table.first_day)).all()
    order = list(RESOURCES)
    return sorted(
        ((owner, name, first_day) for owner, name, first_day in rows),
        key=lambda row: (row[0].startswith(FINGERPRINT), row[0], order.index(row[1])),
    )
