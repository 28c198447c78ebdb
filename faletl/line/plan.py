"""Plan which windows a run extracts, and which endpoint ids it asks for. Sends no requests."""

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
from faletl.warehouse.ledger import SEEN_WITHIN, KnownIds, known_ids, last_extracts, pages_per_window
from faletl.windows import LastExtract, Window, asks_whole_catalogue, due_days, utc_days


@dataclass(frozen=True, slots=True)
class Task:
    """One window of one resource to extract; `ids` where it is asked by ids.

    `ahead` are ids of extracts in which batches of the ids were requested beforehand (see
    faletl/line/distributed.py).
    """

    resource: Resource
    window: Window
    ids: tuple[str, ...] = ()
    is_whole_catalogue: bool = False
    ahead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """The windows and calls that a run would need for one resource.

    The number of calls is a guess (`is_guess`) where endpoint ids are needed and none are known yet.
    """

    resource: str
    windows: tuple[Window, ...]
    calls: int
    is_guess: bool = False


ASSUMED_CATALOGUE = 1400
"""Assumed number of endpoints in fal's catalogue while none is loaded (docs/fal-api.md, "Models")."""

ASSUMED_USED = 50
"""Assumed number of endpoints that an account uses while no usage is loaded."""


def _assumed_ids(task: Task) -> int:
    is_all = task.is_whole_catalogue or task.window.is_snapshot
    return ASSUMED_CATALOGUE if is_all else ASSUMED_USED


def plan(
    settings: Settings,
    connection: sa.Connection | None,
    account: str,
    selection: Asked,
    now: datetime,
    *,
    owners: Iterable[str] = (),
) -> list[Task]:
    """Plan the windows to extract: the named days, or those that are due according to the ledger.

    `owners` are the names under which horizons of the account are stored: its label, and the fingerprint
    of its key if that is not bound yet.
    """
    extracts_by_resource: dict[str, Mapping[date, LastExtract]] = {name: {} for name in RESOURCES}
    rows: Horizons = {}
    if connection is not None:
        extracts_by_resource = {name: last_extracts(connection, account, name) for name in RESOURCES}
        for owner in dict.fromkeys((account, *owners)):
            rows = horizons.merged(rows, horizons.of_owner(connection, owner))
    rows = horizons.moved(rows, account, selection, now, settings.first_days)
    return tasks_of(
        extracts_by_resource, {name: row.first_day for name, row in rows.items()}, selection, now
    )


def tasks_of(
    extracts_by_resource: Mapping[str, Mapping[date, LastExtract]],
    first_days: Mapping[str, date],
    selection: Asked,
    now: datetime,
) -> list[Task]:
    """Plan from the last extract of each day and the first day of each resource with days.

    An open day ends at its last full hour; a day without a full hour is left out.
    """
    tasks = []
    for name, resource in RESOURCES.items():
        if selection.resources and name not in selection.resources:
            continue
        if resource.window == "snapshot":
            today = _known(extracts_by_resource[name], now.date(), now)
            if selection.start is not None or resource.every_run or today is None:
                tasks.append(Task(resource, Window.snapshot(now)))
            continue
        tomorrow = Window.of_day(now.date()).end.date()
        days = (
            utc_days(selection.start, min(selection.end or date.max, tomorrow))
            if selection.start is not None
            else due_days(now, extracts_by_resource[name], first_days[name])
        )
        for day in days:
            if selection.end is not None and day.day >= selection.end:
                break
            if (window := day.settled(now)) is not None:
                is_whole = resource.ids_per_call is not None and asks_whole_catalogue(
                    window, _known(extracts_by_resource[name], window.day, now), now
                )
                tasks.append(Task(resource, window, is_whole_catalogue=is_whole))
    return tasks


def _known(extracts_by_day: Mapping[date, LastExtract], day: date, now: datetime) -> LastExtract | None:
    """Return the last extract of the day, as it counts at `now`."""
    extract = extracts_by_day.get(day)
    return extract.as_of(now) if extract is not None else None


def first_planned(tasks: Iterable[Task]) -> dict[str, date]:
    """Return the first planned day of each resource."""
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
    """Return the tasks with the endpoint ids to request; tasks without ids are left out.

    Requested are ids used in the window or the 90 days before it, ids loaded for the window, and fal's
    whole catalogue: for snapshots always, for days once a week. `used` (by day) and `catalogue` are the
    ids that this run has seen. Ids that fal does not know are not requested for seven days.
    """
    tasks_with_ids = []
    for task in tasks:
        known = KnownIds()
        if connection is not None:
            known = known_ids(connection, account, task.resource, task.window, now)
        since, day = task.window.day - SEEN_WITHIN, task.window.day
        recently_used = (ids for used_on, ids in used.items() if since <= used_on <= day)
        ids, all_ids = known.used_or_loaded.union(*recently_used), known.catalogue.union(catalogue)
        is_whole = task.is_whole_catalogue and bool(all_ids)  # not when the catalogue is unavailable
        if is_whole or task.window.is_snapshot:
            ids |= all_ids
        # A comma separates the values of a list, so an id with a comma cannot be requested.
        askable = tuple(
            sorted(endpoint_id for endpoint_id in ids - known.unknown if "," not in endpoint_id)
        )
        if askable:
            tasks_with_ids.append(replace(task, ids=askable, is_whole_catalogue=is_whole))
    return tasks_with_ids


def forecast(
    settings: Settings,
    connection: sa.Connection | None,
    account: str,
    selection: Asked,
    now: datetime,
    *,
    owners: Iterable[str] = (),
) -> list[Forecast]:
    """Return what a run would extract now, with calls estimated from earlier extracts; see `plan`."""
    tasks = plan(settings, connection, account, selection, now, owners=owners)
    pages = pages_per_window(connection, account) if connection is not None else {}
    by_name: dict[str, list[Task]] = {}
    for task in tasks:
        by_name.setdefault(task.resource.name, []).append(task)
    forecasts = []
    for name, own_tasks in by_name.items():
        resource, is_guess = RESOURCES[name], False
        if resource.ids_per_call is not None:
            known = {
                task.window: len(task.ids) for task in with_ids(connection, account, own_tasks, now)
            }
            is_guess = any(task.window not in known for task in own_tasks)
            ids = [known.get(task.window, _assumed_ids(task)) for task in own_tasks]
            calls = sum(math.ceil(n / resource.ids_per_call) for n in ids) * len(resource.params)
        else:
            calls = math.ceil(len(own_tasks) * pages.get(name, 1)) + len(own_tasks) * (
                resource.proof is not None
            )
        forecasts.append(Forecast(name, tuple(task.window for task in own_tasks), calls, is_guess))
    return forecasts
