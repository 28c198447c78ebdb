"""Overlap: the charges of one account under two labels, which would be counted twice.

A request is charged to one account, so charges are refused if their request ids are loaded under another
label. Usage has no request ids: it is refused until its account is known to differ from every other
label with data of that day. Two labels differ if both have charges of the same day: the second one would
have been refused if it shared any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import date

import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import DataRefusedError
from faletl.landing.extracts import SealedExtract
from faletl.line.plan import Task
from faletl.resources import BILLING_EVENTS, USAGE, Resource
from faletl.staging.window import Staged
from faletl.warehouse.protocol import Warehouse
from faletl.warehouse.tables import FAILURES, LOADS, RAW
from faletl.windows import Window


class SharedChargesError(DataRefusedError):
    """The same charges, or their usage, are loaded under another label already. Exit 3."""


class UnknownOverlapError(DataRefusedError):
    """It is unknown whether the same usage is loaded under another label already. Exit 3."""


def charges_first(
    connection: sa.Connection | None, account: str, tasks: Sequence[Task]
) -> tuple[list[Task], list[Task]]:
    """Split the tasks into those that must be loaded first, and the rest, in their order.

    Charges come first if they alone can show, for a day of planned usage, that the label is not another
    one's account. Charges of such a day are added if they were not planned.
    """
    doubtful = []
    if connection is not None and _has_others(connection, account):
        usage = [task.window for task in tasks if task.resource is USAGE]
        doubtful = [window for window in usage if _suspects(connection, account, window.day)[0]]
    if not doubtful:
        return [], list(tasks)
    charges = [task for task in tasks if task.resource is BILLING_EVENTS]
    planned = {task.window.day for task in charges}
    charges += [Task(BILLING_EVENTS, window) for window in doubtful if window.day not in planned]
    return charges, [task for task in tasks if task.resource is not BILLING_EVENTS]


def in_order(sealed: Iterable[SealedExtract]) -> list[SealedExtract]:
    """Return the extracts in the given order, but charges first: they show whose usage it is."""
    return sorted(sealed, key=lambda landed: landed.manifest.resource != BILLING_EVENTS.name)


def refuse_shared(
    settings: Settings,
    warehouse: Warehouse,
    connection: sa.Connection,
    staged: Staged,
    refused: Collection[tuple[str, date]] = (),
) -> None:
    """Refuse a window that would, or may, count data a second time that is loaded under another label.

    `refused` are the accounts and days whose charges this run has refused for that reason.

    Raises:
        SharedChargesError: request ids of the day are loaded under another label.
        UnknownOverlapError: usage whose account is unknown until its charges are loaded.
    """
    account, day = staged.landed.manifest.account, staged.landed.manifest.window.day
    if staged.resource not in (USAGE, BILLING_EVENTS) or not staged.rows:
        return
    if not _has_others(connection, account):
        return
    if staged.resource is BILLING_EVENTS:
        _refuse_charges(settings, warehouse, connection, staged)
    else:
        is_refused = (account, day) in refused
        others, is_shared = _suspects(connection, account, day, is_refused=is_refused)
        if others and _has_charges(settings, staged):
            is_charged = bool(_labels_with_rows(connection, BILLING_EVENTS, day).intersection(others))
            raise _overlap_error(account, day, others, is_shared=is_shared, is_charged=is_charged)


_CURE = "use one key for the account, or take one label out: faletl accounts forget"


def _refuse_charges(
    settings: Settings, warehouse: Warehouse, connection: sa.Connection, staged: Staged
) -> None:
    manifest, charges = staged.landed.manifest, RAW[BILLING_EVENTS.name].c
    day, time = Window.of_day(manifest.window.day), charges[str(BILLING_EVENTS.time)]
    is_of_others = sa.and_(charges["_account"] != manifest.account, time >= day.start, time < day.end)
    if not connection.execute(sa.select(sa.exists().where(is_of_others))).scalar_one():
        return
    path = staged.files[0].parent / f"{manifest.load_id}.others.parquet"
    query = sa.select(charges.request_id, charges["_account"]).where(is_of_others).distinct()
    warehouse.export_rows(connection, query, path)
    with duck.engine(settings.memory, staged.files[0].parent) as engine:
        shared = engine.execute(f"""
            select others._account, count(distinct request_id)
            from {staged.source} as charges join {quoted(path)} as others using (request_id)
            group by others._account order by all
        """).fetchall()
    path.unlink()
    if shared:
        other, requests = shared[0]
        raise SharedChargesError(
            f"{requests:,} requests of account {manifest.account!a} are loaded under account {other!a} "
            f"already, so they would count twice; {_CURE}",
            account=manifest.account,
        )


def _has_charges(settings: Settings, staged: Staged) -> bool:
    """Return whether some of the usage is in US dollars, like all charges."""
    in_dollars = f"select 1 from {staged.source} where coalesce(currency, 'USD') = 'USD' limit 1"
    with duck.engine(settings.memory, staged.files[0].parent) as engine:
        return engine.execute(in_dollars).fetchone() is not None


def _overlap_error(
    account: str, day: date, others: Sequence[str], *, is_shared: bool, is_charged: bool
) -> DataRefusedError:
    """Return the error for refused usage; `is_charged`: the other labels have charges of that day."""
    names = ", ".join(map(ascii, others))
    if is_shared:
        return SharedChargesError(
            f"charges of that day are loaded under account {names} already, so usage of account "
            f"{account!a} would count twice; {_CURE}",
            account=account,
        )
    if is_charged:
        return UnknownOverlapError(
            f"usage of account {account!a} waits for its own charges of that day, because they show "
            f"whether it is the same account as {names}; load them first, with a key that may read "
            "them: faletl run",
            account=account,
        )
    return UnknownOverlapError(
        f"account {names} has usage of that day but no charges, which would show whether account "
        f"{account!a} is the same one; load them first, with the key of account {names}: "
        f"faletl run --start {day}",
        account=account,
    )


def _has_others(connection: sa.Connection, account: str) -> bool:
    """Return whether data of another label is loaded; usually there is none."""
    others = sa.exists().where(LOADS.c.account != account, LOADS.c.is_current)
    return bool(connection.execute(sa.select(others)).scalar_one())


def _suspects(
    connection: sa.Connection, account: str, day: date, *, is_refused: bool = False
) -> tuple[list[str], bool]:
    """Return labels whose usage of that day may be this account's, and whether shared charges show it.

    If charges of the day are refused, charges of other days prove nothing about it: a key may see
    charges of several accounts.
    """
    if not (present := _labels_of_day(connection, day) - {account}):
        return [], False
    failed = _refused_before(connection, account, day)
    if is_refused or BILLING_EVENTS.name in failed:
        return sorted(present - _labels_known_to_differ(connection, account) or present), True
    return sorted(present - _labels_known_to_differ(connection, account, day if failed else None)), bool(
        failed
    )


def _labels_of_day(connection: sa.Connection, day: date) -> set[str]:
    """Return the labels with charges of that day, or with usage that should have charges.

    A label without charges of any day is left out, unless fetching them failed: its key may not read
    them.
    """
    charged = _labels_with_rows(connection, BILLING_EVENTS, day)
    if not (others := _labels_with_rows(connection, USAGE, day) - charged):
        return charged
    is_failed = FAILURES.c.resource == BILLING_EVENTS.name
    failed = set(connection.execute(sa.select(FAILURES.c.account).where(is_failed)).scalars())
    others &= failed | _labels_with_rows(connection, BILLING_EVENTS)
    usage, window = RAW[USAGE.name].c, Window.of_day(day)
    in_dollars = sa.select(usage["_account"]).where(
        usage["_account"].in_(sorted(others)),
        usage.bucket >= window.start,
        usage.bucket < window.end,
        sa.func.coalesce(usage.currency, "USD") == "USD",
    )
    return charged | set(connection.execute(in_dollars.distinct()).scalars())


def _labels_with_rows(
    connection: sa.Connection, resource: Resource, day: date | None = None
) -> set[str]:
    """Return the labels with loaded rows of that day, or of any day."""
    holders = sa.select(LOADS.c.account).where(_has_rows(LOADS, resource, day)).distinct()
    return set(connection.execute(holders).scalars())


def _labels_known_to_differ(
    connection: sa.Connection, account: str, day: date | None = None
) -> set[str]:
    """Return the labels that have charges of a same day as this label: of `day`, or of any day."""
    own, other = LOADS.alias("own"), LOADS.alias("other")
    accounts = connection.execute(
        sa.select(other.c.account)
        .join(own, own.c.window_start == other.c.window_start)
        .where(
            _has_rows(own, BILLING_EVENTS, day),
            _has_rows(other, BILLING_EVENTS, day),
            own.c.account == account,
        )
        .distinct()
    )
    return set(accounts.scalars())


def _has_rows(
    loads: sa.FromClause, resource: Resource, day: date | None = None
) -> sa.ColumnElement[bool]:
    """Return the condition for current loads with rows of that day, or of any day."""
    condition = sa.and_(loads.c.resource == resource.name, loads.c.is_current, loads.c.rows > 0)
    if day is None:
        return condition
    window = Window.of_day(day)
    return sa.and_(condition, loads.c.window_start >= window.start, loads.c.window_start < window.end)


def _refused_before(connection: sa.Connection, account: str, day: date) -> set[str]:
    """Return the resources for which earlier runs refused that day because of shared charges."""
    window, failures = Window.of_day(day), FAILURES.c
    query = sa.select(failures.resource).where(
        failures.account == account,
        failures.window_start >= window.start,
        failures.window_start < window.end,
        failures.error == SharedChargesError.__name__,
    )
    return set(connection.execute(query).scalars())
