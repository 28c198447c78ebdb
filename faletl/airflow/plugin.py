"""The Airflow plugin: the timetable, and a listener that creates the pool of load and build tasks."""

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
    """Create the pool when a scheduler or a similar component starts; keep an existing pool."""
    if type(component).__name__ == "TaskRunnerMarker":
        return  # a task starts, and tasks cannot query the metadata database
    from airflow.models.pool import Pool

    try:
        if Pool.get_pool(POOL) is None:
            Pool.create_or_update_pool(POOL, 1, POOL_HELP, include_deferred=False)
            log.info("created the pool %s", POOL)
    except Exception:
        # A scheduler must start in any case; tasks that need the pool report that it is missing.
        log.exception(
            'cannot create the pool; create it with: airflow pools set %s 1 "%s"', POOL, POOL_HELP
        )


class FaletlPlugin(AirflowPlugin):
    """The plugin that Airflow loads."""

    name = "faletl"
    listeners = [sys.modules[__name__]]  # noqa: RUF012  # Airflow expects a list
    timetables = [FullHoursTimetable]  # noqa: RUF012
