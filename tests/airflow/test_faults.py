"""What befalls Airflow's tasks: errors of each kind, dead supervisors, no pool, many tries."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]  # it has no types
import pytest
import time_machine

from faletl import pipeline
from faletl.airflow.runs import selection_of
from faletl.config import Settings
from faletl.line import distributed
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from tests import truth
from tests.airflow.conftest import RUN_DAGS, Airflow, few, settings_of
from tests.airflow.test_parts import run_of
from tests.conftest import ask, opened, total
from tests.servers import wait_for
from tests.truth import Account

pytestmark = pytest.mark.xdist_group("airflow")  # which is imported once a process

ALONE = """
from airflow.sdk import DAG
from faletl.airflow.tasks import DAG_ARGS, connections, load_resource
with DAG("alone", schedule=None, **DAG_ARGS):
    load_resource("usage", connections()[0])
"""
"""Usage with nothing beside it: what holds for its tasks holds for those of every resource."""


@pytest.fixture
def alone(airflow: Airflow) -> Airflow:
    """An Airflow with the DAG `alone`, and no other."""
    (airflow.home / "dags" / "alone.py").write_text(ALONE)
    return airflow


# --- Errors of each kind --------------------------------------------------------------------------

OVERTAKEN = """
from faletl.warehouse import schema
take_token = schema.take_token
def overtaken(connection, holder):
    token = take_token(connection, holder)
    take_token(connection, "faletl load, run of tomorrow")
    return token
schema.take_token = overtaken
"""
"""Every lease is lost at once: a newer one is given out."""


@contextmanager
def another_key(airflow: Airflow) -> Iterator[None]:
    """A key that fal does not know."""
    connection = json.loads(airflow.env["AIRFLOW_CONN_FAL_DEFAULT"])
    airflow.env["AIRFLOW_CONN_FAL_DEFAULT"] = json.dumps({**connection, "password": "un:known0123456"})
    yield


@contextmanager
def no_connection(airflow: Airflow) -> Iterator[None]:
    """The connection that a DAG is for is not there."""
    airflow.env["FALETL_CONNECTIONS"] = "fal_gone"
    yield


@contextmanager
def held(airflow: Airflow) -> Iterator[None]:
    """Somebody else has the warehouse, for longer than the task waits."""
    airflow.env["FALETL_LOCK_SECONDS"] = "0.2"
    with open_warehouse(settings_of(airflow)).lease("a long load"):
        yield


@contextmanager
def no_folder(airflow: Airflow) -> Iterator[None]:
    """Where pages are to land is a file."""
    (airflow.home / "file").touch()
    airflow.env["FALETL_LANDING"] = str(airflow.home / "file" / "landing")
    yield


@contextmanager
def spoilt(airflow: Airflow) -> Iterator[None]:
    """The warehouse is no database."""
    path = airflow.home / "warehouse" / "faletl.duckdb"
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    yield


def negative() -> Account:
    """An account with a line that cannot be."""
    account = few()
    account.lines.append(truth.line(account.lines[0].hour, "fal-ai/other", "-1"))
    return account


@dataclass(frozen=True)
class Case:
    """Which task notices what is wrong, what it says, whether it is tried again and people are told."""

    task: str
    says: str
    ends: Literal["failed", "failed quietly", "up_for_retry"]
    retry_delay: int | None = None
    prepare: Callable[[Airflow], AbstractContextManager[object]] = nullcontext
    account: Callable[[], Account] = few
    fault: Fault | None = None
    before: str = ""


BUSY = Fault(status=429, headers={"retry-after": "200"})

CASES = {
    "settings": Case(
        "plan", "there is no connection 'fal_gone'", "failed", prepare=no_connection
    ),
    "key": Case("plan", "fal does not accept FAL_KEY for anything", "failed", prepare=another_key),
    "contract": Case("extract", "fal answered 400", "failed", fault=Fault(status=400)),
    "unavailable": Case("extract", "fal answered 429", "up_for_retry", 200, fault=BUSY),
    "data": Case("extract", "negative", "failed", account=negative),
    "warehouse": Case("plan", "is in use by a long load (process", "up_for_retry", prepare=held),
    "disk": Case("plan", "Not a directory", "up_for_retry", prepare=no_folder),
    "tampered": Case("plan", "run faletl rebuild", "failed", prepare=spoilt),
    "lease": Case(
        "plan", "a newer run took over the warehouse (faletl load, run of tomorrow)", "failed quietly",
        before=OVERTAKEN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_task_fails_at_once_or_is_tried_again_as_its_error_says(
    case: Case, alone: Airflow, webhook: tuple[str, list[Any]]
) -> None:
    url, told = webhook
    alone.env["AIRFLOW_CONN_FAL_NOTIFY"] = json.dumps({"conn_type": "generic", "password": url})

    asked: list[Request] = []

    def broken(request: Request) -> Fault | None:
        if request.path != "/models/usage":
            return None
        asked.append(request)
        return case.fault if len(asked) > 1 else None  # the first one shows whose the key is

    with Sandbox(case.account(), fault=broken) as server:
        alone.connect(server.url)
        with case.prepare(alone):
            (run,) = alone.test("alone", before=case.before)

    state = case.ends.removesuffix(" quietly")
    ended = alone.rows(
        "select distinct task_id, state, try_number, retry_delay_override from task_instance "
        "where state in ('failed', 'up_for_retry')"
    )
    assert ended == [(f"usage.{case.task}", state, 1, case.retry_delay)]
    assert case.says in run["log"]
    assert bool(told) == (case.ends == "failed")


# --- What becomes of a task without its supervisor, or without Airflow -----------------------------

TRY = """
import os, sys, time
from pathlib import Path
import httpx
from airflow.executors.workloads.base import BundleInfo
from airflow.models.taskinstance import TaskInstance
from airflow.sdk.api.datamodels._generated import TaskInstance as Told
from airflow.sdk.execution_time import supervisor
from airflow.utils.session import create_session

task_id, map_index = sys.argv[1:]
with create_session() as session:
    row = session.query(TaskInstance).filter_by(task_id=task_id, map_index=int(map_index)).one()
    if row.state == "running":  # as the scheduler does when no heart beats any more
        row.prepare_db_for_next_try(session)
        row.try_number += 1
    row.state = "queued"
    session.flush()
    names = ("id", "task_id", "dag_id", "run_id", "try_number", "map_index", "dag_version_id")
    told = Told(**{name: getattr(row, name) for name in names})
sys.exit(supervisor.supervise_task(
    ti=told, bundle_info=BundleInfo(name="dags-folder"), dag_rel_path="alone.py", token="",
    client=supervisor.InProcessTestSupervisor._api_client(),
))
"""
"""A try of a task, by Airflow's own supervisor and its task process."""

LATE = """
import faletl.line.replace
fence = faletl.line.replace.fence
def late(lease, **what):
    lease.connection.exec_driver_sql("select pg_advisory_unlock_all()")
    Path("waits.part").write_text(str(os.getpid()))
    Path("waits.part").rename("waits")
    while not Path("goes on").exists():
        time.sleep(0.02)
    try:
        return fence(lease, **what)
    except BaseException as error:
        Path("fails").write_text(f"{type(error).__name__}: {error}")
        raise
faletl.line.replace.fence = late
"""
"""The task has looked at what is loaded, has lost its lock without a word, as it may behind a pooler,
and is about to write."""

DEAF = """
request = supervisor.InProcessTestSupervisor._Client.request
def deaf(self, *args, **kwargs):
    if Path("gone").exists():
        raise httpx.ConnectError("refused")
    return request(self, *args, **kwargs)
supervisor.InProcessTestSupervisor._Client.request = deaf
supervisor.MIN_HEARTBEAT_INTERVAL = 0.2
"""
"""Airflow's API server is gone as soon as a file says so."""


def with_fault(fault: str) -> str:
    """The code of a try to which that happens."""
    imports, rest = TRY.split("\n\n", 1)
    return f"{imports}\n{fault}\n{rest}"


def test_what_a_dead_supervisor_left_running_writes_nothing_once_the_next_try_took_over(
    alone: Airflow, served: Sandbox, database: str
) -> None:
    alone.connect(served.url)
    alone.env["FALETL_WAREHOUSE"] = database
    alone.test({"dag_id": "alone", "mark_success": r"usage\.(load|all_loaded)"})
    supervisor = alone.start(with_fault(LATE), "usage.load", "-1")
    waits = alone.home / "waits"
    wait_for("the first try is about to write", waits.exists, seconds=120, every=0.05)
    left = psutil.Process(int(waits.read_text()))
    os.kill(supervisor, signal.SIGKILL)
    assert alone.finish(supervisor) == -signal.SIGKILL

    alone.run(TRY, "usage.load", "-1")

    def held() -> list[tuple[Any, ...]]:
        loads = "select load_id, window_start, rows, fencing_token, last_fencing_token from ops.loads "
        return ask(settings_of(alone), f"{loads} order by all", opened)

    assert is_at_work(left)
    before = held()
    assert len(before) == 3
    (alone.home / "goes on").touch()
    wait_for("the first try has ended", lambda: not is_at_work(left), seconds=120, every=0.05)
    fails = (alone.home / "fails").read_text()
    assert fails.startswith("LeaseLostError: a newer run took over the warehouse (faletl load, run ")
    assert held() == before
    tries = "select try_number, state from task_instance where task_id = 'usage.load'"
    assert alone.rows(tries) == [(2, "success")]


def test_a_task_that_is_killed_as_airflow_is_gone_goes_on_at_the_page_in_flight(alone: Airflow) -> None:
    is_asked, is_over = threading.Event(), threading.Event()

    def hold(request: Request) -> Fault | None:
        is_of_rows = "time_series" in request.query.get("expand", ())
        if is_of_rows and "cursor" in request.query and not is_asked.is_set():
            is_asked.set()
            is_over.wait(60)
        return None

    with Sandbox(few(), page_size=2, fault=hold) as server:
        alone.connect(server.url)
        alone.test({"dag_id": "alone", "mark_success": r"usage\.(extract|load|all_loaded)"})
        supervisor = alone.start(with_fault(DEAF), "usage.extract", "0")
        assert is_asked.wait(120)
        (alone.home / "gone").touch()
        assert alone.finish(supervisor) != 0
        is_over.set()
        assert "Too many failed heartbeats; terminating process" in (alone.home / "said.log").read_text()

        alone.run(TRY, "usage.extract", "0")

        pages = [
            "cursor" in one.query
            for one in server.requests
            if one.path == "/models/usage" and "time_series" in one.query["expand"]
        ]
    # One binds the key; the first page stands on both sides of the total.
    assert pages == [False, False, False, True, True]
    tries = (
        "select try_number, state from task_instance where task_id = 'usage.extract' and map_index = 0"
    )
    assert alone.rows(tries) == [(2, "success")]


def is_at_work(process: psutil.Process) -> bool:
    """Whether it is there, and not only waits for somebody to take note of its end."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_two_runs_at_once_without_the_pool_load_each_window_once(
    alone: Airflow, served: Sandbox, migrated: Path
) -> None:
    alone.connect(served.url)
    other = Airflow(alone.home / "other", alone.warm, dict(alone.env))  # its scheduler knows of no other
    other.home.mkdir()
    other.env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = f"sqlite:///{other.home / 'airflow.db'}"
    shutil.copyfile(migrated, other.home / "airflow.db")
    asked_for = json.dumps([{"dag_id": "alone"}])

    started = [one.start(RUN_DAGS, asked_for) for one in (alone, other)]
    ended = [alone.finish(pid) for pid in started]

    assert ended == [0, 0]
    for one in (alone, other):
        assert one.rows("select distinct state from dag_run") == [("success",)]
        assert one.rows("select count(*) from slot_pool where pool = 'faletl_warehouse'") == [(0,)]
    settings = settings_of(alone, served.url)
    windows = "select count(*), count(distinct window_start) from ops.loads where resource = 'usage'"
    assert ask(settings, windows, opened) == [(3, 3)]
    pipeline.build(settings)
    pipeline.publish(settings)
    assert total(settings) == sum(one.cost_total for one in few().lines if one.hour >= since(2))


def since(days: int) -> datetime:
    """The start of the UTC day so many days ago."""
    return datetime.combine(datetime.now(UTC).date() - timedelta(days), time(), UTC)


# --- Many tries, and catching up -------------------------------------------------------------------

HOURS = (timedelta(hours=3), timedelta(hours=20))
"""Two hours of each day stand for its 24."""


def test_tasks_that_are_cleared_and_run_again_ask_fal_nothing_and_change_nothing(
    clock: time_machine.Traveller, settings: Settings, sandbox: Sandbox
) -> None:
    path = distributed.write_plan(settings, Asked(truth.day(22), truth.day(23), ["usage"]))
    assert path
    (piece,) = distributed.chunks(path)
    seen = []
    for _ in range(10):
        asked_before = len(sandbox.requests)
        assert distributed.extract_chunk(settings, piece).exit_code == 0
        assert distributed.load_plan(settings, path).exit_code == 0
        held = [
            ask(settings, f"from {table} order by all", opened) for table in ("ops.loads", "raw.usage")
        ]
        seen.append((len(sandbox.requests) - asked_before, held))
        clock.shift(60)
    assert seen[0][0] > 0
    assert seen[1:] == [(0, seen[0][1])] * 9


def test_catching_up_400_days_asks_for_each_once(
    clock: time_machine.Traveller, settings: Settings, sandbox: Sandbox
) -> None:
    clock.move_to(truth.NOW.replace(hour=0, minute=6))  # no hour of today is over
    usage = Asked(resources=["usage"])
    first = truth.NOW.date() - timedelta(days=400)
    midnights = [datetime.combine(first, time(), UTC) + timedelta(days=n) for n in range(400)]
    meant = {
        kind: [
            selection_of(settings, run_of(kind, at + hours), "usage")
            for at in midnights
            for hours in HOURS
        ]
        for kind in ("backfill", "scheduled")
    }

    # One of the runs that touch a day fetches it. What is scheduled for the past does what is due now.
    assert [one.start for one in meant["backfill"] if one] == [at.date() for at in midnights]
    assert all(one == usage for one in meant["scheduled"])
    (forecast,) = pipeline.dry_run(settings, Asked(first, truth.NOW.date(), ["usage"]))
    assert (len(forecast.windows), forecast.calls) == (400, 800)  # some three minutes, five a second
    pipeline.run(settings, usage)
    before = len(sandbox.requests)
    assert distributed.write_plan(settings, usage) is None
    assert [one.path for one in sandbox.requests[before:]] == ["/account/billing"]  # whose key it is
