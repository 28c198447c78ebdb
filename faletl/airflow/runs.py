"""What a DAG run means: which UTC days it is to fetch, or that it does what is due."""

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
"""Runs of a backfill that touch the same day follow one another within so long."""


def asked(settings: Settings, dag_run: Any, resource: str) -> Asked | None:
    """What the run asks for, of a resource; None if an earlier run of its backfill did already.

    A scheduled run, and one without a data interval, does what is due. One that was started by hand or
    belongs to a backfill fetches every UTC day anew that its interval touches; of the many runs of a
    backfill that touch a day, the first does it. Models, prices and credits are read as of now.
    """
    from faletl.resources import RESOURCES
    from faletl.selection import Asked

    days = days_of(dag_run)
    if days is None or dag_run.run_type == "scheduled":
        return Asked(resources=[resource])
    first, end = days
    if dag_run.run_type == "backfill":
        what = f"{dag_run.dag_id}.{resource}"
        touched = [first + timedelta(n) for n in range((end - first).days)]
        if RESOURCES[resource].window == "snapshot":  # of now, whatever day is meant
            touched = [datetime.now(UTC).date()]
        mine = [day for day in touched if _is_first(settings, what, day, dag_run.run_id)]
        if not mine:
            return None
        first, end = mine[0], mine[-1] + timedelta(days=1)
    return Asked(first, end, [resource])


def days_of(dag_run: Any) -> tuple[date, date] | None:
    """The first UTC day that the run's data interval touches, and the day after the last.

    The command line gives a run by hand the interval before now, whatever its logical date: an earlier
    one is meant.
    """
    start, end = dag_run.data_interval_start, dag_run.data_interval_end
    if start is None or end is None:
        return None
    if dag_run.run_type == "manual" and dag_run.logical_date and dag_run.logical_date < start:
        start = end = dag_run.logical_date
    last = max(start, end - timedelta(microseconds=1))
    return start.astimezone(UTC).date(), last.astimezone(UTC).date() + timedelta(days=1)


def _is_first(settings: Settings, what: str, day: date, run: str) -> bool:
    """Whether the run is to fetch the day: no other run of its backfill did.

    Airflow does not tell a run which backfill it belongs to. So each day has a note of the run that
    fetched it last and of those that were spared thereby: each is spared once, and not for long. A run
    that comes again (another backfill, a retry) fetches. Where nothing can be locked, two that ask in
    the same instant both do, which costs calls and changes nothing.
    """
    from faletl.landing.extracts import root
    from faletl.landing.storage import backend_for, write_durably

    folder = root(settings) / ".backfills"
    backend_for(folder).make(folder)
    path, now = folder / f"{what}-{day}.json", datetime.now(UTC)
    with backend_for(folder).lock(path.with_suffix(".lock")):
        is_there = backend_for(path).exists(path)
        note = json.loads(backend_for(path).read(path)) if is_there else {"runs": [], "at": None}
        is_old = note["at"] is None or abs(now - datetime.fromisoformat(note["at"])) > SAME_BACKFILL
        is_first = is_old or run in note["runs"]
        runs = [run] if is_first else [*note["runs"], run]
        write_durably(path, json.dumps({"runs": runs, "at": now.isoformat()}).encode())
    if not is_first:
        log.info("%s of %s: the run %s of this backfill fetches it", what, day, runs[0])
    return is_first
