"""What Airflow loads: the timetable, and a listener that makes the pool of load and build."""

from __future__ import annotations

import logging
import sys

from airflow.listeners import hookimpl
from airflow.sdk.plugins_manager import AirflowPlugin

from faletl.airflow.timetable import FullHoursTimetable

log = logging.getLogger(__name__)

POOL = "faletl_warehouse"
POOL_HELP = "One writer to faletl's warehouse at a time: its load and build tasks."


@hookimpl
def on_starting(component: object) -> None:
    """Make the pool when a scheduler (or alike) starts. A pool that is there stays as it is."""
    if type(component).__name__ == "TaskRunnerMarker":
        return  # a task starts: it cannot ask the metadata database
    from airflow.models.pool import Pool

    try:
        if Pool.get_pool(POOL) is None:
            Pool.create_or_update_pool(POOL, 1, POOL_HELP, include_deferred=False)
            log.info("made the pool %s", POOL)
    except Exception:
        # A scheduler must start whatever happens here; tasks that wait for the pool say so.
        log.exception('make it with: airflow pools set %s 1 "%s"', POOL, POOL_HELP)


class FaletlPlugin(AirflowPlugin):
    """See the module."""

    name = "faletl"
    listeners = [sys.modules[__name__]]  # noqa: RUF012  # Airflow's way to say it
    timetables = [FullHoursTimetable]  # noqa: RUF012
