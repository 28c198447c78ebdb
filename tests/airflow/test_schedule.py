"""When DAGs run, and what a run stands for: by Airflow's own scheduler, with a clock that is moved."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.airflow.conftest import DAGS, Airflow

pytestmark = pytest.mark.xdist_group("airflow")  # which is imported once a process

HOUR, DAY, MINUTE = timedelta(hours=1), timedelta(days=1), timedelta(minutes=1)
MIDNIGHT = datetime(2026, 11, 30, tzinfo=UTC)
DAILY_DAGS = ("fal_analytics", "fal_deadline", "fal_prices")

MAKE_RUNS = """
import datetime
import signal
import time_machine
from pathlib import Path
from sqlalchemy import select
from airflow.api.common.trigger_dag import trigger_dag
from airflow.configuration import conf
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
from airflow.jobs.job import Job
from airflow.jobs.scheduler_job_runner import SchedulerJobRunner
from airflow.models.backfill import ReprocessBehavior, _create_backfill
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
from airflow.utils.types import DagRunTriggeredByType

def parse():  # as the DAG processor does
    folder = Path(conf.get("core", "dags_folder"))
    with create_session() as session:
        DagBundlesManager().sync_bundles_to_db(session=session)
    bag = BundleDagBag(dag_folder=folder, bundle_path=folder, bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    sync_bag_to_db(bag, "dags-folder", None)
    signal.alarm(120)  # as in warm.py, whose alarm is gone: Airflow limits the time of parsing by one

def schedule():  # as the scheduler does, but that each run has ended at once
    now, scheduler = datetime.datetime.now(datetime.timezone.utc), SchedulerJobRunner(Job())
    with create_session() as session:
        due = session.scalars(select(DagModel).where(DagModel.next_dagrun_create_after <= now))
        scheduler._create_dag_runs(due.all(), session)
    with create_session() as session:
        for run in session.scalars(select(DagRun)):
            run.state = "success"
        for dag in session.scalars(select(DagModel)):
            dag.exceeds_max_non_backfill = False

def backfill(dag_id, first, last):
    _create_backfill(
        dag_id=dag_id, from_date=first, to_date=last, reprocess_behavior=ReprocessBehavior.NONE,
        max_active_runs=2, reverse=False, dag_run_conf=None, triggering_user_name="nobody",
    )

def trigger(dag_id, at):
    trigger_dag(dag_id=dag_id, logical_date=at, triggered_by=DagRunTriggeredByType.CLI)

def show():
    with create_session() as session:
        runs = session.scalars(select(DagRun).order_by(DagRun.id))
        print([(run.dag_id, str(run.run_type), *(
            at.timestamp() for at in (run.data_interval_start, run.data_interval_end, run.run_after)
        )) for run in runs])
"""
"""Functions that make runs as Airflow's parts do, and one that prints the runs that there are."""


def runs_of(airflow: Airflow, code: str) -> list[tuple[Any, ...]]:
    """The runs that the code makes: DAG, type, data interval from and to, and the earliest start."""
    for file in DAGS.glob("*.py"):
        (airflow.home / "dags" / file.name).symlink_to(file)
    shown = eval(airflow.run(f"{MAKE_RUNS}{code}\nshow()").splitlines()[-1])  # noqa: S307
    return [(*run[:2], *(datetime.fromtimestamp(at, UTC) for at in run[2:])) for run in shown]


def test_scheduled_runs_start_past_the_hour_and_stand_for_full_hours_and_days(airflow: Airflow) -> None:
    looks = [MIDNIGHT - 3 * HOUR + 50 * MINUTE]  # the first: the DAGs are new, and switched on
    looks += [MIDNIGHT + n * HOUR + m * MINUTE for n in (-2, -1, 0, 1) for m in (0, 5, 6, 9, 10, 11)]
    runs = runs_of(
        airflow,
        f"""
for at in {looks!r}:
    with time_machine.travel(at, tick=False):
        parse()
        schedule()
""",
    )

    def are_of(dag: str, length: timedelta, starts: list[datetime], delay: timedelta) -> bool:
        mine = [run[1:] for run in runs if run[0] == dag]
        return mine == [("scheduled", at, at + length, at + length + delay) for at in starts]

    assert {run[0] for run in runs} == {"fal_usage", "fal_maintain", *DAILY_DAGS}
    # The first run is that of the last hour, or day, that can be read already: it starts at once.
    hours = [MIDNIGHT + n * HOUR for n in (-4, -3, -2, -1, 0)]
    assert are_of("fal_usage", HOUR, hours, 6 * MINUTE), runs
    for dag in DAILY_DAGS:
        assert are_of(dag, DAY, [MIDNIGHT - 2 * DAY, MIDNIGHT - DAY], 10 * MINUTE), runs
    assert are_of("fal_maintain", 7 * DAY, [MIDNIGHT - 8 * DAY + 3 * HOUR], 40 * MINUTE), runs


def test_backfills_and_runs_by_hand_stand_for_full_hours_and_days_too(airflow: Airflow) -> None:
    now, by_hand = MIDNIGHT + 4 * HOUR + 3 * MINUTE, MIDNIGHT - 9 * DAY + 3 * MINUTE
    hours, days = [MIDNIGHT + n * HOUR for n in range(-1, 4)], [MIDNIGHT - n * DAY for n in (20, 19, 18)]
    runs = runs_of(
        airflow,
        f"""
with time_machine.travel({now!r}, tick=False):
    parse()
    backfill("fal_usage", {hours[0] - 57 * MINUTE!r}, {now + DAY!r})
    backfill("fal_prices", {days[0]!r}, {days[-1]!r})
    trigger("fal_usage", {by_hand!r})
    trigger("fal_prices", {by_hand!r})
""",
    )

    assert [run[:4] for run in runs] == [
        *(
            ("fal_usage", "backfill", at, at + HOUR)
            for at in (MIDNIGHT + n * HOUR for n in range(-1, 4))
        ),
        *(("fal_prices", "backfill", at, at + DAY) for at in (MIDNIGHT - n * DAY for n in (20, 19, 18))),
        ("fal_usage", "manual", MIDNIGHT + 3 * HOUR, MIDNIGHT + 4 * HOUR),
        ("fal_prices", "manual", MIDNIGHT - DAY, MIDNIGHT),
    ]
    waits = [run for run in runs if run[1] == "backfill" and run[4] > now]
    assert [run[4] for run in waits] == [MIDNIGHT + 4 * HOUR + 6 * MINUTE]  # its hour cannot be read yet
