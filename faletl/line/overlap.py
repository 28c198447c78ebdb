"""Overlap: the charges of one account under two labels, which would be counted twice.

A request is charged to one account, so a day of charges whose request ids are loaded under another
label is refused. Usage has no request ids. It is refused while nothing tells its label from another
one that holds something of that day. What tells two labels apart is in the tables alone: a day of
which both hold charges, as the second one would have been refused if it had shared any.
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
    """Charges, or the usage that they are of, are loaded under another label already. Exit 3."""


class UnknownOverlapError(DataRefusedError):
    """It is not known yet whether usage is loaded under another label already. Exit 3."""


def charges_first(
    connection: sa.Connection | None, account: str, tasks: Sequence[Task]
) -> tuple[list[Task], list[Task]]:
    """Split the tasks into what must be loaded first, and the rest, in their order.

    First come the charges, if usage is asked for of a day on which only they can tell the label from
    another one. Those of such a day are added where they were not asked for.
    """
    doubtful = []
    if connection is not None and _has_others(connection, account):
        usage = [task.window for task in tasks if task.resource is USAGE]
        doubtful = [window for window in usage if _suspects(connection, account, window.day)[0]]
    if not doubtful:
        return [], list(tasks)
    charges = [task for task in tasks if task.resource is BILLING_EVENTS]
    asked = {task.window.day for task in charges}
    charges += [Task(BILLING_EVENTS, window) for window in doubtful if window.day not in asked]
    return charges, [task for task in tasks if task.resource is not BILLING_EVENTS]


def in_order(reads: Iterable[SealedExtract]) -> list[SealedExtract]:
    """The extracts in the order given, but charges first: they tell whose usage it is."""
    return sorted(reads, key=lambda landed: landed.manifest.resource != BILLING_EVENTS.name)


def refuse_shared(
    settings: Settings,
    warehouse: Warehouse,
    connection: sa.Connection,
    staged: Staged,
    refused: Collection[tuple[str, date]] = (),
) -> None:
    """Refuse a window that would, or may, count what is loaded under another label once more.

    `refused` are the accounts and days of which this run has refused the charges for that reason.

    Raises:
        SharedChargesError: request ids of the day are loaded under another label.
        UnknownOverlapError: usage, and the charges that would tell whose it is are not loaded.
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
            is_charged = bool(_holders(connection, BILLING_EVENTS, day).intersection(others))
            raise _overlap(account, day, others, is_shared=is_shared, is_charged=is_charged)


_CURE = "use one key for the account, or take one label out: faletl accounts forget"


def _refuse_charges(
    settings: Settings, warehouse: Warehouse, connection: sa.Connection, staged: Staged
) -> None:
    manifest, charges = staged.landed.manifest, RAW[BILLING_EVENTS.name].c
    day, time = Window.of_day(manifest.window.day), charges[str(BILLING_EVENTS.time)]
    theirs = sa.and_(charges["_account"] != manifest.account, time >= day.start, time < day.end)
    if not connection.execute(sa.select(sa.exists().where(theirs))).scalar_one():
        return
    path = staged.files[0].parent / f"{manifest.load_id}.others.parquet"
    found = sa.select(charges.request_id, charges["_account"]).where(theirs).distinct()
    warehouse.hand_out(connection, found, path)
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
    """Whether some of the usage is in US dollars, as all charges are."""
    in_dollars = f"select 1 from {staged.source} where coalesce(currency, 'USD') = 'USD' limit 1"
    with duck.engine(settings.memory, staged.files[0].parent) as engine:
        return engine.execute(in_dollars).fetchone() is not None


def _overlap(
    account: str, day: date, others: Sequence[str], *, is_shared: bool, is_charged: bool
) -> DataRefusedError:
    """Why usage of that day is refused; `is_charged` says whether the others hold charges of it."""
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
        f"account {names} holds usage of that day but no charges, which would show whether account "
        f"{account!a} is the same one; load them first, with the key of account {names}: "
        f"faletl run --start {day}",
        account=account,
    )


def _has_others(connection: sa.Connection, account: str) -> bool:
    """Whether the warehouse holds anything of another label: of most it does not."""
    others = sa.exists().where(LOADS.c.account != account, LOADS.c.is_current)
    return bool(connection.execute(sa.select(others)).scalar_one())


def _suspects(
    connection: sa.Connection, account: str, day: date, *, is_refused: bool = False
) -> tuple[list[str], bool]:
    """The labels whose usage of that day may be this one's, and whether shared charges show it.

    Where charges of the day are refused, other days say nothing of it: a key may see charges of several
    accounts.
    """
    if not (present := _present(connection, day) - {account}):
        return [], False
    failed = _refused_before(connection, account, day)
    if is_refused or BILLING_EVENTS.name in failed:
        return sorted(present - _apart_from(connection, account) or present), True
    return sorted(present - _apart_from(connection, account, day if failed else None)), bool(failed)


def _present(connection: sa.Connection, day: date) -> set[str]:
    """The labels that hold charges of that day, or usage that should have some.

    A label without charges of any day is left out, unless fal failed to give some: its key may not read
    them.
    """
    charged = _holders(connection, BILLING_EVENTS, day)
    if not (others := _holders(connection, USAGE, day) - charged):
        return charged
    is_failed = FAILURES.c.resource == BILLING_EVENTS.name
    failed = set(connection.execute(sa.select(FAILURES.c.account).where(is_failed)).scalars())
    others &= failed | _holders(connection, BILLING_EVENTS)
    usage, window = RAW[USAGE.name].c, Window.of_day(day)
    in_dollars = sa.select(usage["_account"]).where(
        usage["_account"].in_(sorted(others)),
        usage.bucket >= window.start,
        usage.bucket < window.end,
        sa.func.coalesce(usage.currency, "USD") == "USD",
    )
    return charged | set(connection.execute(in_dollars.distinct()).scalars())


def _holders(connection: sa.Connection, resource: Resource, day: date | None = None) -> set[str]:
    """The labels that hold rows of that day, or of any day."""
    holders = sa.select(LOADS.c.account).where(_holds(LOADS, resource, day)).distinct()
    return set(connection.execute(holders).scalars())


def _apart_from(connection: sa.Connection, account: str, day: date | None = None) -> set[str]:
    """The labels that hold charges of a day, or of that day, of which this one holds charges, too."""
    mine, theirs = LOADS.alias("mine"), LOADS.alias("theirs")
    found = connection.execute(
        sa.select(theirs.c.account)
        .join(mine, mine.c.window_start == theirs.c.window_start)
        .where(
            _holds(mine, BILLING_EVENTS, day),
            _holds(theirs, BILLING_EVENTS, day),
            mine.c.account == account,
        )
        .distinct()
    )
    return set(found.scalars())


def _holds(loads: sa.FromClause, resource: Resource, day: date | None = None) -> sa.ColumnElement[bool]:
    """Current loads with rows of that day, or of any day."""
    holds = sa.and_(loads.c.resource == resource.name, loads.c.is_current, loads.c.rows > 0)
    if day is None:
        return holds
    window = Window.of_day(day)
    return sa.and_(holds, loads.c.window_start >= window.start, loads.c.window_start < window.end)


def _refused_before(connection: sa.Connection, account: str, day: date) -> set[str]:
    """Of which resources earlier runs refused that day because its charges are shared."""
    window, failures = Window.of_day(day), FAILURES.c
    found = sa.select(failures.resource).where(
        failures.account == account,
        failures.window_start >= window.start,
        failures.window_start < window.end,
        failures.error == SharedChargesError.__name__,
    )
    return set(connection.execute(found).scalars())
