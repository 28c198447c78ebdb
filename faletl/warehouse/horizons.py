"""Horizons: from which UTC day on the days of an account are to be loaded, per resource.

The first day that anybody asked for is written down before fal is asked anything, so that a run that
dies at its first request forgets nothing. From then on it alone decides which days are due: neither a
load nor a rebuild moves it. Until the label of a key is known, the horizon stands under the fingerprint
of the key (faletl/line/accounts.py); it moves to the label in the transaction that binds it.
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
"""The resources that have a horizon: a snapshot is of now, whatever day is meant."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """The first day to load of a resource.

    It `is_decided` once a run without dates, or `faletl horizon`, has settled it: until then the next
    such run may go back further, by FALETL_FIRST_DAYS.
    """

    first_day: date
    is_decided: bool = False


Horizons = Mapping[str, Horizon]
"""By resource."""


def held(connection: sa.Connection, owner: str) -> Horizons:
    """Return the horizons of a label, or of a key by its fingerprint."""
    table = HORIZONS.c
    found = connection.execute(
        sa.select(table.resource, table.first_day, table.is_decided).where(table.account == owner)
    )
    return {name: Horizon(first_day, bool(is_decided)) for name, first_day, is_decided in found}


def moved(known: Horizons, owner: str, asked: Asked, now: datetime, first_days: int) -> Horizons:
    """Return the horizons once `asked` is planned at `now`; `first_days` is FALETL_FIRST_DAYS.

    Days that are named move a horizon back, never forward. So does the first plain run of a label;
    that of an unknown key only where nothing is known, as the label may be older than the key. A horizon
    after tomorrow is of a clock that was ahead, and counts for nothing.
    """
    tomorrow = now.date() + timedelta(days=1)
    known = {name: row for name, row in known.items() if row.first_day <= tomorrow}
    recent = max(FIRST_DAY, now.date() - timedelta(days=first_days))
    names = [name for name in BY_DAY if not asked.resources or name in asked.resources]
    is_pending = owner.startswith(FINGERPRINT)
    after = {name: _moved(known.get(name), asked.start, recent, is_pending=is_pending) for name in names}
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
    """Return the horizons of a label that gets those of its key.

    What a plain run asked for with the key alone is no reason to move what the label has decided.
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
    settings: Settings, warehouse: Warehouse, owner: str, asked: Asked, now: datetime
) -> Horizons | None:
    """Write down what `asked` makes of the horizons of `owner`; the warehouse is made if need be.

    Returns what they were before, None where nothing changed, as nearly always.

    Raises:
        WarehouseError, SettingsError, StorageError: the warehouse, or the landing folder, takes nothing.
    """
    with warehouse.reading() as connection:
        known = held(connection, owner) if connection is not None else {}
    if moved(known, owner, asked, now, settings.first_days) == known:
        return None
    with warehouse.lease("faletl, which writes the first day asked for") as lease, lease.transaction():
        known = held(lease.connection, owner)
        write(settings, lease, owner, moved(known, owner, asked, now, settings.first_days))
    return known


def put_back(settings: Settings, warehouse: Warehouse, owner: str, before: Horizons) -> None:
    """Undo `remember` for a run that was refused: wrong use leaves everything as it was."""
    with warehouse.lease("faletl, which was refused") as lease, lease.transaction():
        write(settings, lease, owner, before)


def write(settings: Settings, lease: Lease, owner: str, rows: Horizons) -> None:
    """Inside a transaction: make these all horizons of `owner`, and record the decision."""
    fence(lease, changes_data=False)
    replace(lease.connection, owner, rows)
    decisions.record(settings, _decision(settings, owner, rows))


def replace(connection: sa.Connection, owner: str, rows: Horizons) -> None:
    """Inside a transaction: make these all horizons of `owner`."""
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
    """Return the horizons that were written down then."""
    return {
        name: Horizon(first_day, name in decision.decided)
        for name, first_day in decision.first_days.items()
    }


def refuse_odd(day: date, resources: Collection[str]) -> None:
    """Raises UsageError where there can be no such first day, or a resource has no horizon."""
    refuse_odd_day("--set", day)
    if odd := sorted(set(resources) - set(BY_DAY)):
        raise UsageError(
            f"{odd[0]} is a snapshot of now and has no horizon; these have one: {', '.join(BY_DAY)}"
        )


def decide(settings: Settings, lease: Lease, owner: str, day: date, resources: Collection[str]) -> None:
    """Inside a transaction: set the first day of these resources (none: of all that have one).

    Days before it that are loaded stay as they are, and are not extracted again.
    """
    chosen = {name: Horizon(day, is_decided=True) for name in resources or BY_DAY}
    write(settings, lease, owner, {**held(lease.connection, owner), **chosen})


def all_held(connection: sa.Connection) -> Iterable[tuple[str, str, date]]:
    """Owner, resource and first day of each horizon: labels in order, then keys without a label."""
    table = HORIZONS.c
    found = connection.execute(sa.select(table.account, table.resource, table.first_day)).all()
    order = list(RESOURCES)
    return sorted(
        ((owner, name, first_day) for owner, name, first_day in found),
        key=lambda one: (one[0].startswith(FINGERPRINT), one[0], order.index(one[1])),
    )
