"""Plan: which windows a run reads, and which endpoint ids it asks for. Asks fal nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from types import MappingProxyType

import sqlalchemy as sa

from faletl.config import Settings
from faletl.resources import RESOURCES, Resource
from faletl.selection import Asked
from faletl.warehouse import horizons
from faletl.warehouse.horizons import Horizons
from faletl.warehouse.ledger import SEEN_WITHIN, KnownIds, known_ids, pages_per_window, reads_by_day
from faletl.windows import LastExtract, Window, asks_whole_catalogue, due_days, utc_days


@dataclass(frozen=True, slots=True)
class Task:
    """One window of one resource to extract; `ids` where it is asked by ids.

    `ahead` are reads of it in which batches of the ids were asked beforehand (see
    faletl/line/distributed.py).
    """

    resource: Resource
    window: Window
    ids: tuple[str, ...] = ()
    is_whole_catalogue: bool = False
    ahead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would do with one resource.

    The calls are a guess (`is_guess`) where endpoint ids are asked for and none are known yet.
    """

    resource: str
    windows: tuple[Window, ...]
    calls: int
    is_guess: bool = False


ASSUMED_CATALOGUE = 1400
"""Endpoints that fal's catalogue is taken to have while none is loaded (docs/fal-api.md, "Models")."""

ASSUMED_USED = 50
"""Endpoints that an account is taken to use while no usage is loaded."""


def _assumed_ids(task: Task) -> int:
    is_all = task.is_whole_catalogue or task.window.is_snapshot
    return ASSUMED_CATALOGUE if is_all else ASSUMED_USED


def plan(
    settings: Settings,
    connection: sa.Connection | None,
    account: str,
    asked: Asked,
    now: datetime,
    *,
    owners: Iterable[str] = (),
) -> list[Task]:
    """The windows to extract: the days named, else those that are due, by the ledger.

    `owners` are under whose names horizons of the account stand: its label, and its key if that is not
    bound yet.
    """
    reads: dict[str, Mapping[date, LastExtract]] = {name: {} for name in RESOURCES}
    rows: Horizons = {}
    if connection is not None:
        reads = {name: reads_by_day(connection, account, name) for name in RESOURCES}
        for owner in dict.fromkeys((account, *owners)):
            rows = horizons.merged(rows, horizons.held(connection, owner))
    rows = horizons.moved(rows, account, asked, now, settings.first_days)
    return tasks_of(reads, {name: row.first_day for name, row in rows.items()}, asked, now)


def tasks_of(
    reads: Mapping[str, Mapping[date, LastExtract]],
    first_days: Mapping[str, date],
    asked: Asked,
    now: datetime,
) -> list[Task]:
    """The same, from what was read and the first day of each resource that has days.

    A day that has not ended is cut at its last full hour; one of which no hour has ended is left out.
    """
    tasks = []
    for name, resource in RESOURCES.items():
        if asked.resources and name not in asked.resources:
            continue
        if resource.window == "snapshot":
            today = _known(reads[name], now.date(), now)
            if asked.start is not None or resource.every_run or today is None:
                tasks.append(Task(resource, Window.snapshot(now)))
            continue
        tomorrow = Window.of_day(now.date()).end.date()
        days = (
            utc_days(asked.start, min(asked.end or date.max, tomorrow))
            if asked.start is not None
            else due_days(now, reads[name], first_days[name])
        )
        for day in days:
            if asked.end is not None and day.day >= asked.end:
                break
            if (window := day.settled(now)) is not None:
                is_whole = resource.ids_per_call is not None and asks_whole_catalogue(
                    window, _known(reads[name], window.day, now), now
                )
                tasks.append(Task(resource, window, is_whole_catalogue=is_whole))
    return tasks


def _known(reads: Mapping[date, LastExtract], day: date, now: datetime) -> LastExtract | None:
    """What is known of the day at `now`."""
    read = reads.get(day)
    return read.as_of(now) if read is not None else None


def first_planned(tasks: Iterable[Task]) -> dict[str, date]:
    """Per resource the first day of the plan."""
    first: dict[str, date] = {}
    for task in tasks:
        first[task.resource.name] = min(first.get(task.resource.name, date.max), task.window.day)
    return first


def with_ids(
    connection: sa.Connection | None,
    account: str,
    tasks: Iterable[Task],
    now: datetime,
    *,
    used: Mapping[date, Collection[str]] = MappingProxyType({}),
    catalogue: Collection[str] = (),
) -> list[Task]:
    """The tasks with the endpoint ids to ask for; those without any are left out.

    Asked for is what the window or the 90 days before it used or hold, and fal's catalogue: for
    snapshots always, for days when their turn has come. `used` (by day) and `catalogue` are what this
    run has seen of them. Ids that fal said it does not know are left alone for some days.
    """
    found = []
    for task in tasks:
        known = KnownIds()
        if connection is not None:
            known = known_ids(connection, account, task.resource, task.window, now)
        since, day = task.window.day - SEEN_WITHIN, task.window.day
        lately = (ids for on, ids in used.items() if since <= on <= day)
        ids, all_ids = known.used_or_held.union(*lately), known.catalogue.union(catalogue)
        is_whole = task.is_whole_catalogue and bool(all_ids)  # not when fal's catalogue was out of reach
        if is_whole or task.window.is_snapshot:
            ids |= all_ids
        # In a list of values a comma parts two of them, so an id with one cannot be asked for.
        askable = tuple(sorted(one for one in ids - known.unknown if "," not in one))
        if askable:
            found.append(replace(task, ids=askable, is_whole_catalogue=is_whole))
    return found


def forecast(
    settings: Settings,
    connection: sa.Connection | None,
    account: str,
    asked: Asked,
    now: datetime,
    *,
    owners: Iterable[str] = (),
) -> list[Forecast]:
    """What a run would read now, and in how many calls by earlier reads. Arguments as `plan`."""
    tasks = plan(settings, connection, account, asked, now, owners=owners)
    pages = pages_per_window(connection, account) if connection is not None else {}
    by_name: dict[str, list[Task]] = {}
    for task in tasks:
        by_name.setdefault(task.resource.name, []).append(task)
    forecasts = []
    for name, mine in by_name.items():
        resource, is_guess = RESOURCES[name], False
        if resource.ids_per_call is not None:
            known = {task.window: len(task.ids) for task in with_ids(connection, account, mine, now)}
            is_guess = any(task.window not in known for task in mine)
            ids = [known.get(task.window, _assumed_ids(task)) for task in mine]
            calls = sum(math.ceil(n / resource.ids_per_call) for n in ids) * len(resource.params)
        else:
            calls = math.ceil(len(mine) * pages.get(name, 1)) + len(mine) * (resource.proof is not None)
        forecasts.append(Forecast(name, tuple(task.window for task in mine), calls, is_guess))
    return forecasts
