"""The timetable of the scheduled DAGs; the plugin registers it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from airflow.timetables.base import DataInterval, TimeRestriction
from airflow.timetables.interval import CronDataIntervalTimetable

if TYPE_CHECKING:
    from airflow.timetables.base import DagRunInfo
    from pendulum import DateTime


class FullHoursTimetable(CronDataIntervalTimetable):
    """Runs start at the times of a cron expression; their data intervals are full hours.

    `6 * * * *` starts the run of 09:00 to 10:00 at 10:06, `10 0 * * *` that of a day at 00:10 of the day
    after. The cron expression alone would give intervals such as 09:06 to 10:06, so times are moved by
    these minutes before the cron timetable sees them, and moved back afterwards.
    """

    @property
    def _delay(self) -> timedelta:
        return timedelta(minutes=int(self._expression.split()[0]))

    def infer_manual_data_interval(self, *, run_after: DateTime) -> DataInterval:
        """Return the last interval that ended by `run_after`, though its own run may start later."""
        interval = super().infer_manual_data_interval(run_after=run_after + self._delay)
        return _moved(interval, -self._delay)

    def next_dagrun_info(
        self, *, last_automated_data_interval: DataInterval | None, restriction: TimeRestriction
    ) -> DagRunInfo | None:
        """Return the next run: its interval lies on the hour, `run_after` is the time of the cron."""
        delay, last = self._delay, last_automated_data_interval
        earliest, latest = (bound and bound + delay for bound in restriction[:2])
        info = super().next_dagrun_info(
            last_automated_data_interval=last and _moved(last, delay),
            restriction=TimeRestriction(earliest, latest, restriction.catchup),
        )
        if info is None or info.data_interval is None:
            return info
        return info._replace(data_interval=_moved(info.data_interval, -delay))


def _moved(interval: DataInterval, by: timedelta) -> DataInterval:
    return DataInterval(interval.start + by, interval.end + by)
