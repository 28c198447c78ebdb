"""Overlap: the charges of one account under two labels, which would be counted twice.

A request is charged to one account. So a day of charges whose request ids are loaded under another
label is refused, and usage of that day with it: usage has no request ids, so the charges of a new
label are extracted and loaded first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date

import duckdb
import sqlalchemy as sa

from faletl.config import Settings
from faletl.errors import DataRefusedError
from faletl.plan import Task
from faletl.resources import BILLING_EVENTS, USAGE
from faletl.staging import Staged
from faletl.warehouse import Warehouse, quoted
from faletl.warehouse.tables import FAILURES, LOADS, RAW
from faletl.windows import Window


class SharedChargesError(DataRefusedError):
    """The account is another one's a second time: its charges are loaded under another label. Exit 3."""


def charges_first(
    connection: sa.Connection | None, account: str, tasks: Sequence[Task]
) -> tuple[list[Task], list[Task]]:
    """Split the tasks into what must be loaded first, and the rest, in their order.

    First come the charges of each day whose usage is asked for, where the label has none yet and
    others do: they tell whether the usage is that of another label. They are added where they were not
    asked for.
    """
    usage = [task.window for task in tasks if task.resource is USAGE]
    if connection is None or not usage or not _is_new_among_others(connection, account):
        return [], list(tasks)
    mine = [task for task in tasks if task.resource is BILLING_EVENTS]
    asked = {task.window.day for task in mine}
    mine += [Task(BILLING_EVENTS, window) for window in usage if window.day not in asked]
    return mine, [task for task in tasks if task.resource is not BILLING_EVENTS]


def _is_new_among_others(connection: sa.Connection, account: str) -> bool:
    """Whether no charges of the label are loaded yet, and charges of others are."""
    holders = connection.execute(
        sa.select(LOADS.c.account)
        .where(LOADS.c.resource == BILLING_EVENTS.name, LOADS.c.is_current, LOADS.c.rows > 0)
        .distinct()
    ).scalars()
    labels = set(holders)
    return bool(labels) and account not in labels


def refuse_shared(
    settings: Settings,
    warehouse: Warehouse,
    connection: sa.Connection,
    staged: Staged,
    refused: Collection[date],
) -> None:
    """Raises SharedChargesError for a window that would, or may, count charges of another label again.

    `refused` are the days whose charges this run has refused for the same reason.
    """
    if staged.resource not in (USAGE, BILLING_EVENTS) or not staged.rows:
        return
    account, day = staged.landed.manifest.account, staged.landed.manifest.window.day
    if not (others := _holders(connection, account, day)):
        return
    if staged.resource is BILLING_EVENTS:
        _refuse_charges(settings, warehouse, connection, staged)
    elif day in refused or _are_charges_refused(connection, account, day):
        raise SharedChargesError(
            f"the charges of that day are loaded under account {_listed(others)} already, so usage of "
            f"account {account!a} would count twice; {_CURE}"
        )
    elif _is_new_among_others(connection, account) and not _has_charges(connection, account, day):
        raise SharedChargesError(
            f"usage of the new account {account!a} is loaded after the charges of that day, which tell "
            f"whether they are those of account {_listed(others)}; load them first: faletl run"
        )


_CURE = "use one key for the account, or take one label out: faletl accounts forget"


def _refuse_charges(
    settings: Settings, warehouse: Warehouse, connection: sa.Connection, staged: Staged
) -> None:
    manifest, charges = staged.landed.manifest, RAW[BILLING_EVENTS.name].c
    day, time = Window.of_day(manifest.window.day), charges[str(BILLING_EVENTS.time)]
    theirs = sa.and_(charges["_account"] != manifest.account, time >= day.start, time < day.end)
    path = staged.files[0].parent / f"{manifest.load_id}.others.parquet"
    found = sa.select(charges.request_id, charges["_account"]).where(theirs).distinct()
    warehouse.hand_out(connection, found, path)
    with duckdb.connect(config={"memory_limit": settings.memory}) as engine:
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
            f"already, so they would count twice; {_CURE}"
        )


def _of_day(account: sa.ColumnElement[bool], day: date) -> sa.ColumnElement[bool]:
    """Current loads of charges on that day."""
    window, loads = Window.of_day(day), LOADS.c
    return sa.and_(
        account,
        loads.resource == BILLING_EVENTS.name,
        loads.window_start >= window.start,
        loads.window_start < window.end,
        loads.is_current,
    )


def _holders(connection: sa.Connection, account: str, day: date) -> list[str]:
    """The other labels of which charges of that day are loaded."""
    others = sa.and_(_of_day(LOADS.c.account != account, day), LOADS.c.rows > 0)
    return sorted(connection.execute(sa.select(LOADS.c.account).where(others).distinct()).scalars())


def _has_charges(connection: sa.Connection, account: str, day: date) -> bool:
    """Whether the charges of that day are loaded, be they none."""
    mine = sa.exists().where(_of_day(LOADS.c.account == account, day))
    return bool(connection.execute(sa.select(mine)).scalar_one())


def _are_charges_refused(connection: sa.Connection, account: str, day: date) -> bool:
    """Whether an earlier run refused the charges of that day as those of another label."""
    window, failures = Window.of_day(day), FAILURES.c
    refused = sa.exists().where(
        failures.account == account,
        failures.resource == BILLING_EVENTS.name,
        failures.window_start >= window.start,
        failures.window_start < window.end,
        failures.error == SharedChargesError.__name__,
    )
    return bool(connection.execute(sa.select(refused)).scalar_one())


def _listed(labels: Collection[str]) -> str:
    return ", ".join(map(ascii, labels))
