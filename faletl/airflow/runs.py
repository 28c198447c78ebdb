"""The selection of a DAG run: the UTC days that it fetches, or what is due."""

from __future__ import annotations

import json
import logging
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faletl.config import Settings
    from faletl.selection import Asked

log = logging.getLogger(__name__)

SAME_BACKFILL = timedelta(hours=1)
"""The longest time between two runs of one backfill that touch the same day."""


def selection_of(settings: Settings, dag_run: Any, resource: str) -> Asked | None:
    """Return what the run fetches of a resource; None if an earlier run of its backfill fetched it.

    A scheduled run, and one without a data interval, fetches what is due. A manual or backfill run
    fetches again every UTC day that its interval touches; if several runs of a backfill touch a day, the
    first one fetches it. Models, prices and credits are always fetched as of now.
    """
    from faletl.resources import RESOURCES
    from faletl.selection import Asked

    days = days_of(dag_run)
    if days is None or dag_run.run_type == "scheduled":
        return Asked(resources=[resource])
    first, end = days
    if dag_run.run_type == "backfill":
        backfill = f"{dag_run.dag_id}.{resource}"
        touched = [first + timedelta(n) for n in range((end - first).days)]
        if RESOURCES[resource].window == "snapshot":  # always as of now
            touched = [datetime.now(UTC).date()]
        days_to_fetch = [day for day in touched if _is_first(settings, backfill, day, dag_run.run_id)]
        if not days_to_fetch:
            return None
        first, end = days_to_fetch[0], days_to_fetch[-1] + timedelta(days=1)
    return Asked(first, end, [resource])


def days_of(dag_run: Any) -> tuple[date, date] | None:
    """Return the first UTC day that the run's data interval touches, and the day after the last.

    The command line gives a manual run the interval before now, even if its logical date is
    earlier; then the logical date counts.
    """
    start, end = dag_run.data_interval_start, dag_run.data_interval_end
    if start is None or end is None:
        return None
    if dag_run.run_type == "manual" and dag_run.logical_date and dag_run.logical_date < start:
        start = end = dag_run.logical_date
    last = max(start, end - timedelta(microseconds=1))
    return start.astimezone(UTC).date(), last.astimezone(UTC).date() + timedelta(days=1)


def _is_first(settings: Settings, backfill: str, day: date, run: str) -> bool:
    """Whether the run must fetch the day, because no other run of its backfill did.

    Airflow does not show a run which backfill it belongs to. So each day has a note with the run that
    fetched it last and the runs that skipped it since. A run skips a day only once, and only within
    `SAME_BACKFILL`; a run that comes again (another backfill, a retry) fetches. If the
    landing folder has no locks, two runs at the same instant both fetch, which costs calls only.
    """
    from faletl.landing.extracts import root
    from faletl.landing.storage import backend_for, write_durably

    folder = root(settings) / ".backfills"
    backend_for(folder).make(folder)
    path, now = folder / f"{backfill}-{day}.json", datetime.now(UTC)
    with backend_for(folder).lock(path.with_suffix(".lock")):
        is_there = backend_for(path).exists(path)
        note = json.loads(backend_for(path).read(path)) if is_there else {"runs": [], "at": None}
        is_old = note["at"] is None or abs(now - datetime.fromisoformat(note["at"])) > SAME_BACKFILL
        is_first = is_old or run in note["runs"]
        runs = [run] if is_first else [*note["runs"], run]
        write_durably(path, json.dumps({"runs": runs, "at": now.isoformat()}).encode())
    if not is_first:
        log.info(
            "%s of %s: skipped, because the run %s of this backfill fetches it", backfill, day, runs[0]
        )
    return is_first
