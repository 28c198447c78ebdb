"""All of it for real: Airflow's own processes on PostgreSQL, the DAGs, kills, and a search for keys.

    python -m tests.airflow.e2e [--executor local|celery] [--keep] [--serve]

Nothing is mocked but fal: its place takes the sandbox, whose account spends nothing more from the hour
before the start, so that whatever reads it later sees the same. Needs PostgreSQL, for celery Redis, and
some minutes; keeps to a temporary folder. Exits with 0 only if all of it held.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import duckdb
import httpx
import zstandard

from faletl.config import Settings
from faletl.line.release import is_behind
from faletl.operations.check import check
from faletl.resources import RESOURCES
from faletl.sandbox import Fault, Request, Sandbox, invented_world
from tests.airflow.services import WORKERS, Airflow, Executor, Json, running
from tests.conftest import all_tables, ask
from tests.servers import LOOPBACK, kill, tree_of, wait_for

# Secrets as nothing else looks; what they hold changes when it is percent-encoded.
KEY = "e2e-key:never+seen/anywhere=5f2c9a7e"
WRONG_KEY = "e2e-key:wrong+and/unseen=b81d03c6e94f"
WEBHOOK_PATH = "/hook-of-nobody-7d20e5b1"

CONNECTION = "fal_default"
POOL = "faletl_warehouse"
FIRST_DAYS = 3
RAW = "faletl://warehouse/raw/"
SNAPSHOT = "the instant of a snapshot"
DEADLINE_HOUR = 6  # UTC

Tables = dict[str, list[tuple[Any, ...]]]

# A machine that others use, too, may take its time.
A_RUN, A_BACKFILL = 600, 1200


def secret_of(key: str) -> str:
    """The half of a key that nobody may see."""
    return key.partition(":")[2]


# --- Airflow's REST API ---------------------------------------------------------------------------


class Api:
    """What a person does in the UI, by REST. All requests are an admin's."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        token = self.ask("GET", "/auth/token")["access_token"]
        self._client.headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, body: Json | None = None, **query: Any) -> Any:
        """The answer to a request; raises RuntimeError with what it says where it is no success."""
        response = self._client.request(method, path, json=body, params=query)
        if response.is_error:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text}")
        return response.json()

    def unpause(self, *dags: str) -> None:
        """Switch DAGs on, once the dag-processor has found them."""
        for dag in dags:
            wait_for(f"{dag} is known", partial(self._is_known, dag), seconds=120)
            self.pause(dag, is_paused=False)

    def pause(self, dag: str, *, is_paused: bool) -> None:
        """Switch a DAG off or on."""
        self.ask("PATCH", f"/api/v2/dags/{dag}", {"is_paused": is_paused})

    def trigger(self, dag: str, conf: Json | None = None) -> Json:
        """Start a run by hand."""
        run: Json = self.ask(
            "POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf or {}}
        )
        return run

    def runs(self, dag: str = "~", **query: Any) -> list[Json]:
        """Runs of a DAG, or of all."""
        return self._all(f"/api/v2/dags/{dag}/dagRuns", "dag_runs", **query)

    def tasks(self, dag: str = "~", run: str = "~", **query: Any) -> list[Json]:
        """Task instances of a run, or of all."""
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances"
        return self._all(path, "task_instances", **query)

    def log(self, task: Json) -> str:
        """What the last try of a task said, line by line as JSON."""
        dag, run, name = task["dag_id"], task["dag_run_id"], task["task_id"]
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{name}/logs/{task['try_number']}"
        lines = self.ask("GET", path, map_index=task["map_index"], full_content=True)["content"]
        return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)

    def asset_events(self) -> list[Json]:
        """What moved, oldest first."""
        return self._all("/api/v2/assets/events", "asset_events", order_by="timestamp")

    def events_waiting(self, dag: str) -> bool:
        """Whether an asset has moved for which the DAG has not run yet."""
        return bool(self.ask("GET", f"/api/v2/dags/{dag}/assets/queuedEvents")["queued_events"])

    def _is_known(self, dag: str) -> bool:
        return any(one["dag_id"] == dag for one in self._all("/api/v2/dags", "dags"))

    def _all(self, path: str, name: str, **query: Any) -> list[Json]:
        found: list[Json] = []
        while True:
            answer = self.ask("GET", path, limit=100, offset=len(found), **query)
            found += answer[name]
            if len(found) >= answer["total_entries"] or not answer[name]:
                return found


# --- What stands around Airflow -------------------------------------------------------------------


class Hold:
    """The sandbox's `fault`: holds answers about some days back, so that whoever asks is mid-task."""

    def __init__(self) -> None:
        self.path = ""
        self.days: frozenset[str] = frozenset()
        self.is_asked, self.is_over = threading.Event(), threading.Event()

    def __call__(self, request: Request) -> Fault | None:
        """Let a request wait if it is one of those that are held."""
        if request.path == self.path and day_asked(request) in self.days and not self.is_over.is_set():
            self.is_asked.set()
            self.is_over.wait(60)
        return None


def day_asked(request: Request) -> str | None:
    """The UTC day whose beginning a request asks from."""
    start = request.query.get("start", [""])[0]
    return start[:10] or None


class Webhook:
    """Where `fal_notify` points: keeps the messages that are posted to it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.messages.append(json.loads(body)["text"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = HTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_port}{WEBHOOK_PATH}"
        threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True).start()


@dataclass
class Trial:
    """What the steps share."""

    folder: Path
    airflow: Airflow
    sandbox: Sandbox
    hold: Hold
    webhook: Webhook
    today: date
    told: list[str] = field(default_factory=list)
    _api: Api | None = None

    @property
    def api(self) -> Api:
        """Airflow's REST API, once it is up."""
        if self._api is None:
            self._api = Api(self.airflow.url)
        return self._api

    @property
    def days(self) -> list[date]:
        """The five past days that the schedule leaves alone, right before those that it reads."""
        return [self.today - timedelta(n) for n in range(FIRST_DAYS + 5, FIRST_DAYS, -1)]

    @property
    def landing(self) -> Path:
        """FALETL_LANDING."""
        return self.folder / "landing"

    @property
    def warehouse(self) -> Path:
        """The warehouse that Airflow fills; readers open `spend.duckdb` beside it."""
        return self.folder / "warehouse" / "faletl.duckdb"

    def tell(self, sentence: str) -> None:
        """Add to what the step that is under way is said to have found."""
        self.told.append(sentence)

    def settings(self, warehouse: Path | None = None, key: str = KEY) -> Settings:
        """For what this process does itself."""
        url = f"duckdb:///{warehouse or self.warehouse}"
        return Settings.isolated(key=key, api_url=self.sandbox.url, warehouse=url, rate=0)

    def reads(self, resource: str, day: date) -> int:
        """How often a day was read completely."""
        return len(list(self.landing.glob(f"*/{resource}/{day}/*/manifest.json")))

    def wait_for_run(self, run: Json, seconds: float = A_RUN) -> Json:
        """The run when it has ended, however it did."""
        path = f"/api/v2/dags/{run['dag_id']}/dagRuns/{run['dag_run_id']}"

        def ended() -> Json | None:
            self.airflow.check()
            now: Json = self.api.ask("GET", path)
            return now if now["state"] in ("success", "failed") else None

        return wait_for(f"{run['dag_id']} {run['dag_run_id']} ends", ended, seconds=seconds)

    def wait_until_quiet(self, seconds: float = A_RUN) -> None:
        """Until nothing is under way; no run may fail, and readers must see all that was loaded."""

        def is_under_way() -> bool:
            return bool(self.api.runs(state=["queued", "running"]))

        def is_quiet() -> bool:
            self.airflow.check()
            assert not (failed := self.api.runs(state="failed")), f"runs failed: {names_of(failed)}"
            # What moved waits for fal_spend, then becomes a run of it: look at runs before and after.
            return not (is_under_way() or self.api.events_waiting("fal_spend") or is_under_way())

        wait_for("all runs end", is_quiet, seconds=seconds, every=2)
        assert not is_behind(self.settings()), "something is loaded and not built"
        shown = self.warehouse.with_name("spend.duckdb")
        assert newest_build(shown) == newest_build(self.warehouse), "the newest build is not published"


def newest_build(database: Path) -> datetime:
    """When it began."""
    with duckdb.connect(str(database), read_only=True) as connection:
        ((started,),) = connection.execute("select max(started_at) from ops.builds").fetchall()
    assert isinstance(started, datetime)
    return started


def names_of(runs: Sequence[Json]) -> list[str]:
    """The runs, for people."""
    return [f"{run['dag_id']} {run['dag_run_id']}" for run in runs]


# --- The steps ------------------------------------------------------------------------------------


def connect(trial: Trial) -> None:
    """the form of a connection, its button Test, a good key and a bad one"""
    api = trial.api
    forms = {form["connection_type"]: form for form in api.ask("GET", "/ui/connections/hook_meta")}
    assert set(forms["fal"]["extra_fields"]) == {"metrics_api_key", "account", "rate"}, forms["fal"]
    assert forms["fal"]["standard_fields"]["password"]["title"] == "Key", forms["fal"]

    connection = {"connection_id": CONNECTION, "conn_type": "fal", "host": trial.sandbox.url}
    api.ask("POST", "/api/v2/connections", {**connection, "password": KEY})
    good = api.ask("POST", "/api/v2/connections/test", connection)
    assert good["status"] is True, good
    assert all(name in good["message"] for name in RESOURCES), good

    bad = api.ask("POST", "/api/v2/connections/test", {**connection, "password": WRONG_KEY})
    assert bad["status"] is False, bad
    assert sentence_of_bad_key(trial) in bad["message"], bad
    notify = {"connection_id": "fal_notify", "conn_type": "http", "password": trial.webhook.url}
    api.ask("POST", "/api/v2/connections", notify)


def sentence_of_bad_key(trial: Trial) -> str:
    """What `faletl check` says to a key that fal does not accept."""
    (problem,) = check(trial.settings(key=WRONG_KEY)).problems
    return problem.sentence


def find_pool(trial: Trial) -> None:
    """the pool that the plugin makes has one slot"""
    pools = {pool["name"]: pool["slots"] for pool in trial.api.ask("GET", "/api/v2/pools")["pools"]}
    assert pools.get(POOL) == 1, f"no pool {POOL} of one slot: {pools}"


def run_on_schedule(trial: Trial) -> None:
    """scheduled runs of all DAGs, and what they set off"""
    # Analytics asks for the endpoints that usage and the catalogue name: they come first.
    for dags in (("fal_prices", "fal_usage", "fal_spend"), ("fal_analytics",)):
        trial.api.unpause(*dags)
        for dag in dags:
            wait_for(f"{dag} begins", partial(trial.api.runs, dag), seconds=A_RUN)
        trial.wait_until_quiet()
    types = Counter((run["dag_id"], run["run_type"]) for run in trial.api.runs())
    for dag in ("fal_prices", "fal_usage", "fal_analytics"):
        assert types[dag, "scheduled"], types
    assert types["fal_spend", "asset_triggered"], types
    published = all_tables(trial.settings())
    for table in ("raw.usage", "raw.analytics", "raw.prices", "reports.rpt_spend_daily"):
        assert published[table], f"{table} is published empty"
    trial.tell(f"{sum(types.values())} runs, {len(published['raw.billing_events']):,} billing events")


def backfill(trial: Trial) -> None:
    """a backfill of five days, two runs at a time, with two of its tasks killed"""
    borders = [datetime(day.year, day.month, day.day, tzinfo=UTC) for day in trial.days[1:]]
    span = {
        "from_date": (borders[0] - timedelta(hours=1)).isoformat(),
        "to_date": (borders[-1] + timedelta(minutes=59)).isoformat(),
    }
    body = {"dag_id": "fal_usage", **span}
    dry = trial.api.ask("POST", "/api/v2/backfills/dry_run", body)["backfills"]
    begins = [datetime.fromisoformat(run["logical_date"]) for run in dry]
    wanted = {
        begin
        for begin in begins
        for border in borders
        if timedelta(hours=-1) <= begin - border < timedelta(hours=1)
    }
    mark_done(trial, [begin for begin in begins if begin not in wanted])

    before = {(name, day): trial.reads(name, day) for name in ("usage", "billing_events")
              for day in trial.days}  # fmt: skip
    assert not any(before.values()), before
    trial.hold.path, trial.hold.days = "/models/billing-events", frozenset(map(str, trial.days))
    trial.airflow.run(
        ["airflow", "backfill", "create", "--dag-id", "fal_usage", "--max-active-runs", "2",
         "--from-date", span["from_date"], "--to-date", span["to_date"]]
    )  # fmt: skip
    most_at_once = Watch(lambda: len(trial.api.runs("fal_usage", run_type="backfill", state="running")))
    with most_at_once:
        kill_while_extracting(trial)
        kill_while_loading(trial)
        trial.wait_until_quiet(A_BACKFILL)

    runs = trial.api.runs("fal_usage", run_type="backfill")
    assert len(runs) == len(wanted), names_of(runs)
    assert {run["state"] for run in runs} == {"success"}, names_of(runs)
    assert most_at_once.highest == 2, f"{most_at_once.highest} runs at a time"
    after = {key: trial.reads(*key) for key in before}
    assert set(after.values()) == {1}, f"days were not read once each: {after}"
    retried = [task for task in trial.api.tasks() if task["try_number"] > 1]
    assert len(retried) >= 2, "the kills left no trace"
    trial.tell(f"{trial.days[0]} to {trial.days[-1]}, {len(runs)} runs; again: {tries_of(retried)}")


def mark_done(trial: Trial, begins: Sequence[datetime]) -> None:
    """Tell Airflow that there were runs of these logical dates, for the backfill to leave them out.

    All 120 hours of five days take two cores a quarter of an hour. Left are those around each midnight.
    """
    trial.api.pause("fal_usage", is_paused=True)
    for begin in begins:
        body = {"logical_date": begin.isoformat(), "dag_run_id": f"done__{begin.isoformat()}"}
        run = trial.api.ask("POST", "/api/v2/dags/fal_usage/dagRuns", body)
        path = f"/api/v2/dags/fal_usage/dagRuns/{run['dag_run_id']}"
        trial.api.ask("PATCH", path, {"state": "success", "note": "left out of the trial"})
    trial.api.pause("fal_usage", is_paused=False)


class Watch:
    """Looks at a number all the time, beside the steps; keeps the highest."""

    def __init__(self, number: Callable[[], int]) -> None:
        self.highest = 0
        self._number, self._is_over = number, threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(2):
            with suppress(httpx.HTTPError, RuntimeError):
                self.highest = max(self.highest, self._number())


def tries_of(tasks: Sequence[Json]) -> str:
    """Tasks and their tries, for people."""
    return ", ".join(f"{task['task_id']} ×{task['try_number']}" for task in tasks)


def kill_while_extracting(trial: Trial) -> None:
    """SIGKILL whoever waits for fal's answer in a task of the backfill."""
    wait_for("a task asks fal", trial.hold.is_asked.is_set, seconds=A_RUN)

    def asking() -> int | None:
        tasks = trial.api.tasks("fal_usage", state="running")
        pids = [task["pid"] for task in tasks if task["task_id"] == "billing_events.extract"]
        return next((pid for pid in pids if pid and tree_of(pid)), None)

    kill_executor(trial, wait_for("the task that asks is running", asking, seconds=60))
    trial.hold.is_over.set()


def kill_while_loading(trial: Trial) -> None:
    """SIGKILL whoever writes to the warehouse; it does so for a moment only, so it is frozen first."""
    told = trial.warehouse.with_name(f"{trial.warehouse.name}.holder")

    def loading() -> int | None:
        with suppress(OSError, ValueError):  # not there, or only half of it
            holder = json.loads(told.read_bytes())
            if holder["holder"].startswith("faletl load"):
                return int(holder["pid"])
        return None

    def frozen() -> int | None:
        for one in tree_of(pid)[:1] if (pid := loading()) else []:
            one.suspend()
            if loading() == pid:
                return pid
            one.resume()  # it had just done
        return None

    kill_executor(trial, wait_for("a task loads", frozen, seconds=A_RUN, every=0.002))


def kill_executor(trial: Trial, pid: int) -> None:
    """SIGKILL the process of a task and all that could tell of it; for Celery the whole worker."""
    is_celery = trial.airflow.executor == "celery"
    for name in WORKERS if is_celery else ("scheduler",):
        service = trial.airflow.services[name]
        if pid not in service.pids:
            continue
        if is_celery:
            service.kill()
            trial.airflow.start_worker(name)
        else:
            task = tree_of(pid)
            kill([*task[0].parents()[:1], *task])  # first the executor's process that looks after it
        return
    raise LookupError(f"the process {pid} is none of Airflow's, or is gone")


def backfill_by_form(trial: Trial) -> None:
    """fal_backfill by its form: a dry run that reads nothing, then all resources of five days"""
    conf: Json = {
        "start": str(trial.days[0]),
        "end": str(trial.days[-1] + timedelta(days=1)),
        "resources": list(RESOURCES),
    }
    trial.api.unpause("fal_backfill")
    days = set(map(str, trial.days))
    asked, landed = len(trial.sandbox.requests), set(trial.landing.rglob("*"))
    run = trial.wait_for_run(trial.api.trigger("fal_backfill", {**conf, "dry_run": True}))
    assert run["state"] == "success", run
    read = [one.path for one in trial.sandbox.requests[asked:] if day_asked(one) in days]
    assert not read, f"a dry run read {read}"
    new = {path for path in set(trial.landing.rglob("*")) - landed if days & set(path.parts)}
    assert not new, f"a dry run landed {new}"
    plans = [one for one in trial.api.tasks("fal_backfill", run["dag_run_id"])
             if one["task_id"].endswith(".plan")]  # fmt: skip
    assert len(plans) == len(RESOURCES), plans
    for one in plans:
        assert " windows, " in trial.api.log(one), f"{one['task_id']} does not tell what it would read"

    run = trial.wait_for_run(trial.api.trigger("fal_backfill", {**conf, "dry_run": False}))
    assert run["state"] == "success", run
    reads = {(name, day): trial.reads(name, day) for name in RESOURCES
             if RESOURCES[name].window == "day" for day in trial.days}  # fmt: skip
    for (name, day), times in reads.items():
        assert times == (1 if name == "analytics" else 2), f"{name} of {day} was read {times} times"
    trial.wait_until_quiet()


def follow_assets(trial: Trial) -> None:
    """what moved, in the events of the assets and in the runs that they set off"""
    assets = {asset["uri"] for asset in trial.api.ask("GET", "/api/v2/assets")["assets"]}
    expected = {RAW + name for name in RESOURCES}
    expected |= {f"faletl://warehouse/{name}" for name in ("marts", "reports", "published")}
    assert expected <= assets, expected - assets
    events = trial.api.asset_events()
    assert {event["uri"] for event in events} == expected, Counter(event["uri"] for event in events)
    usage = [event["extra"] for event in events if event["uri"] == f"{RAW}usage"]
    assert all(isinstance(extra["rows"], int) and extra["account"] == "sandbox" for extra in usage), (
        usage
    )
    moved = {window for extra in usage for window in extra["windows"]}
    assert set(map(str, trial.days)) <= moved, f"no event tells of {trial.days}: {usage}"
    runs = trial.api.runs("fal_spend")
    assert {run["run_type"] for run in runs} == {"asset_triggered"}, runs
    trial.tell(f"{len(events)} events, {len(runs)} runs of fal_spend")


def refuse_key(trial: Trial) -> None:
    """a key that fal refuses: fails at once, says what to do, tells the webhook"""
    path = f"/api/v2/connections/{CONNECTION}"
    connection = {"connection_id": CONNECTION, "conn_type": "fal"}
    trial.api.ask("PATCH", path, {**connection, "password": WRONG_KEY}, update_mask="password")
    try:
        run = trial.wait_for_run(trial.api.trigger("fal_usage"))
        assert run["state"] == "failed", run
        tasks = trial.api.tasks("fal_usage", run["dag_run_id"])
        plans = [task for task in tasks if task["task_id"].endswith(".plan")]
        for plan in plans:
            assert (plan["state"], plan["try_number"]) == ("failed", 1), plan
            assert sentence_of_bad_key(trial) in trial.api.log(plan), trial.api.log(plan)
        for plan in plans:
            start = f"fal_usage, {plan['task_id']} failed: "
            told = [message for message in trial.webhook.messages if message.startswith(start)]
            assert told, f"the webhook got {trial.webhook.messages}"
    finally:
        trial.api.ask("PATCH", path, {**connection, "password": KEY}, update_mask="password")


def compare_with_terminal(trial: Trial) -> None:
    """`faletl run` over the same days in a folder of its own makes the same tables"""
    folder = trial.folder / "terminal"
    folder.mkdir()
    warehouse = folder / "faletl.duckdb"
    environment = {
        "PATH": f"{Path(sys.executable).parent}",
        "FAL_KEY": KEY,
        "FALETL_API_URL": trial.sandbox.url,
        "FALETL_WAREHOUSE": f"duckdb:///{warehouse}",
        "FALETL_LANDING": str(folder / "landing"),
        "FALETL_FIRST_DAYS": str(FIRST_DAYS),
        "FALETL_RATE": "0",
    }
    done = subprocess.run(
        ["faletl", "run", "--start", str(trial.days[0])],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (folder / "run.log").write_text(done.stdout + done.stderr, "utf-8")
    assert done.returncode == 0, done.stderr
    here, there = comparable(trial.settings()), comparable(trial.settings(warehouse))
    told = [difference(name, here, there) for name in sorted(here.keys() | there.keys())]
    assert not any(told), "\n".join(filter(None, told))
    trial.tell(f"{len(here)} tables, {sum(map(len, here.values())):,} rows")


def comparable(settings: Settings) -> Tables:
    """All tables, whenever and however often snapshots were taken: those that are equal count as one."""
    snapshots = " union ".join(
        f"select _snapshot_at from {resource.table}"
        for resource in RESOURCES.values()
        if resource.window == "snapshot"
    )
    instants = {at.replace(tzinfo=None) for (at,) in ask(settings, snapshots)}

    def shown(value: Any) -> Any:
        is_one = isinstance(value, datetime) and value.replace(tzinfo=None) in instants
        return SNAPSHOT if is_one else value

    tables = {}
    for name, rows in all_tables(settings).items():
        shown_rows = [tuple(map(shown, row)) for row in rows]
        others = [row for row in shown_rows if SNAPSHOT not in row]
        tables[name] = others + list(dict.fromkeys(row for row in shown_rows if SNAPSHOT in row))
    return tables


def difference(table: str, here: Tables, there: Tables) -> str:
    """What one side has of a table and the other has not; empty if nothing."""
    rows, others = (Counter(map(repr, side.get(table, ["no table"]))) for side in (here, there))
    if rows == others:
        return ""
    only_here, only_there = list((rows - others).elements()), list((others - rows).elements())
    return (
        f"{table}: {len(only_here)} rows in Airflow's alone, {len(only_there)} in the terminal's alone, "
        f"such as {only_here[:2]} and {only_there[:2]}"
    )


def miss_deadline(trial: Trial) -> None:
    """fal_deadline sees yesterday; a deadline that has passed reaches the webhook by the triggerer"""
    trial.api.unpause("fal_deadline")
    (run,) = wait_for("fal_deadline is scheduled", partial(trial.api.runs, "fal_deadline"), seconds=120)
    assert trial.wait_for_run(run)["state"] == "success", run
    if datetime.now(UTC).hour >= DEADLINE_HOUR:  # the run began after its deadline
        message = "fal_deadline: yesterday's spend is not modelled by 06:00 UTC"
        wait_for("the webhook hears of it", lambda: message in trial.webhook.messages, seconds=120)


def read_logs(trial: Trial) -> None:
    """no task that ended well tells of an error"""
    failed = {(task["dag_run_id"], task["task_id"]) for task in trial.api.tasks(state="failed")}
    told: Counter[str] = Counter()
    logs = list((trial.airflow.home / "logs").rglob("attempt=*.log"))
    for log in logs:
        run, task = (word.partition("=")[2] for word in log.relative_to(trial.airflow.home).parts[2:4])
        if (run, task) not in failed:
            told.update(
                line["event"] for line in lines_of(log) if line["level"] in ("error", "critical")
            )
    assert not told, f"errors in logs of tasks that did not fail: {told.most_common(5)}"
    trial.tell(f"{len(logs)} logs")


def lines_of(log: Path) -> Iterator[Json]:
    """What a task said; without a last line that a kill left half written."""
    for line in log.read_text("utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def search_for_keys(trial: Trial) -> None:
    """the keys and the webhook's path are in no byte of any file"""
    hidden = [secret_of(KEY), secret_of(WRONG_KEY), WEBHOOK_PATH.removeprefix("/")]
    sought = {form: secret for secret in hidden for form in forms_of(secret)}
    export(trial)
    (trial.folder / "metadata.sql").write_bytes(trial.airflow.postgres.dump())
    assert CONNECTION in (trial.folder / "metadata.sql").read_text("utf-8"), "the dump is not whole"
    bait = trial.folder / "bait"
    bait.write_bytes(b"\n".join(sought))
    files, size, found = 0, 0, []
    for path, content in contents(trial.folder):
        files, size = files + 1, size + len(content)
        found += [(path, form) for form in sought if form in content]
    bait.unlink()
    baited = [form for path, form in found if path == bait]
    assert baited == list(sought), "the search is blind"
    leaks = sorted({str(path) for path, _ in found if path != bait})
    assert not leaks, f"secrets lie in {leaks}"
    trial.tell(f"{files:,} files, {size / 2**20:,.0f} MiB")


def forms_of(secret: str) -> Iterator[bytes]:
    """How a secret may be written down: plain, percent-encoded, or in base64 wherever it begins."""
    for text in dict.fromkeys((secret, quote(secret, safe=""), quote(secret), quote_plus(secret))):
        yield text.encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for lead in range(3):
            coded = encode(b"\0" * lead + secret.encode())
            yield coded[4 if lead else 0 : len(coded) // 4 * 4 - 4]
    yield json.dumps(secret).strip('"').replace("/", "\\/").encode()


def export(trial: Trial) -> None:
    """Write what DuckDB's files hold as text beside them: in the files themselves it is compressed."""
    for path in (trial.warehouse, trial.warehouse.with_name("spend.duckdb")):
        with duckdb.connect(str(path), read_only=True) as connection:
            connection.execute(f"export database '{path.with_suffix('.export')}' (format csv)")


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below the folder, as it lies there and, where it is compressed, as it was."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        with suppress(FileNotFoundError):  # Airflow and PostgreSQL are still at work
            content = path.read_bytes()
            yield path, content
            if path.suffix == ".zst":
                yield path, zstandard.ZstdDecompressor().decompress(content)


STEPS: Sequence[Callable[[Trial], None]] = (
    find_pool,
    connect,
    run_on_schedule,
    backfill,
    backfill_by_form,
    follow_assets,
    compare_with_terminal,
    miss_deadline,
    refuse_key,
    read_logs,
    search_for_keys,
)


# --- Putting it together --------------------------------------------------------------------------


def main() -> None:
    """Start all, take the steps, stop all; exits with 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.airflow.e2e")
    parser.add_argument("--executor", choices=("local", "celery"), default="local")
    parser.add_argument("--keep", action="store_true", help="leave the folder where it is")
    parser.add_argument("--serve", action="store_true", help="go on after the steps, until Ctrl-C")
    given = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM):  # whoever asks us to end: all is stopped first
        signal.signal(signum, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="faletl-e2e-"))
    folder.chmod(0o711)  # PostgreSQL runs as somebody else
    try:
        is_well = try_all(folder, given.executor, is_served=given.serve)
    except KeyboardInterrupt:
        is_well = False
    if given.keep:
        say(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(0 if is_well else 1)


def try_all(folder: Path, executor: Executor, *, is_served: bool) -> bool:
    """All steps in a folder, with the time that each takes; returns whether all held."""
    now = early_in_a_day()
    stands_still = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    hold, began = Hold(), time.monotonic()
    world = invented_world(now=lambda: stands_still)
    (folder / "warehouse").mkdir()
    with Sandbox(world, keys={KEY: "FULL"}, fault=hold) as sandbox:
        settings = {
            "FALETL_WAREHOUSE": f"duckdb:///{folder / 'warehouse' / 'faletl.duckdb'}",
            "FALETL_LANDING": str(folder / "landing"),
            "FALETL_FIRST_DAYS": str(FIRST_DAYS),
            "FALETL_RATE": "0",
        }
        airflow = Airflow(folder, executor, settings)
        trial = Trial(folder, airflow, sandbox, hold, Webhook(), now.date())
        say(f"{executor} executor, {folder}, {airflow.url}")
        try:
            with running(airflow):
                say_time(began, "all processes are healthy")
                for step in STEPS:
                    take(step, trial)
                say_time(began, "in all")
                if is_served:
                    serve(airflow)
        except Exception:  # noqa: BLE001 whatever it is, it is told and counted
            say(traceback.format_exc())
            say_what_failed(trial)
            return False
    return True


def early_in_a_day() -> datetime:
    """Now; where the UTC day ends soon, only after it: all that is compared must be of one day."""
    while ((now := datetime.now(UTC)) + timedelta(minutes=30)).date() > now.date():
        say(f"it is {now:%H:%M} UTC: waits for the day to end")
        time.sleep(60)
    return now


def take(step: Callable[[Trial], None], trial: Trial) -> None:
    """Take a step and tell how long it took."""
    began = time.monotonic()
    trial.told.clear()
    try:
        step(trial)
    except Exception:
        say_time(began, f"FAILED: {step.__doc__}")
        say_failed_tasks(trial)
        raise
    say_time(began, "; ".join([str(step.__doc__), *trial.told]))


def serve(airflow: Airflow) -> None:
    """Leave all as it is until Ctrl-C."""
    say(f"open {airflow.url} (nobody is asked for a password); Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def say(text: str) -> None:
    """To whoever waits."""
    print(text, flush=True)


def say_time(began: float, what: str) -> None:
    """How long something took."""
    say(f"{time.monotonic() - began:6.1f} s  {what}")


def say_failed_tasks(trial: Trial) -> None:
    """The logs of tasks that did not end well, while Airflow can still be asked."""
    with suppress(httpx.HTTPError, RuntimeError):
        for task in trial.api.tasks(state=["failed", "up_for_retry", "upstream_failed"]):
            say(f"--- {task['dag_id']} {task['dag_run_id']} {task['task_id']}: {task['state']}")
            say(trial.api.log(task)[-3000:])


def say_what_failed(trial: Trial) -> None:
    """The last lines of each process."""
    for log in sorted(trial.airflow.logs.glob("*.log")):
        lines = log.read_text("utf-8", "replace").splitlines()
        say("\n".join([f"--- {log.relative_to(trial.folder)}", *(line[:300] for line in lines[-15:])]))


if __name__ == "__main__":
    main()
