"""The DAGs, run for real: they load what a terminal loads, and nothing of a key is left anywhere."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from faletl import pipeline
from faletl.landing.extracts import complete_reads
from faletl.line.release import is_published
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.airflow.conftest import Airflow, few, settings_of
from tests.conftest import settings_for
from tests.leaks import everything_in, leaks

pytestmark = pytest.mark.xdist_group("airflow")  # which is imported once a process

TODAY = datetime.now(UTC).date()
LINE = ("fal_prices", "fal_usage", "fal_analytics", "fal_spend", "fal_deadline")
KEY = "canary-kid-7c1d:canary-secret-0123456789"
METRICS_KEY = "another-kid-e8f2:another-secret-9876543210"

CLOSED = {
    "raw.usage": "bucket",
    "raw.billing_events": "timestamp",
    "raw.analytics": "bucket",
    "marts.fct_usage": "usage_date",
    "marts.fct_billing_event": "usage_date",
    "marts.fct_requests": "usage_date",
    "reports.rpt_spend_daily": "usage_date",
    "reports.rpt_spend_by_credential": "usage_date",
}


def closed_days(published: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of the days before today, without where they landed."""
    found = {}
    with duckdb.connect(str(published), read_only=True) as connection:
        connection.execute("set TimeZone = 'UTC'")
        for table, day in CLOSED.items():
            rows = connection.execute(
                f"select columns(c -> c not in ('_load_id', '_page', '_row', 'load_id')) from {table} "
                f"where \"{day}\" < '{TODAY}'"
            )
            found[table] = sorted(rows.fetchall(), key=repr)
    return found


def load_usage(airflow: Airflow, server: Sandbox) -> None:
    """What is asked for by ids needs endpoints that were used."""
    settings = settings_of(airflow, server.url)
    pipeline.extract(settings, Asked(TODAY - timedelta(days=1), TODAY, ["usage"]))
    assert [outcome.outcome for outcome in pipeline.load(settings).outcomes] == ["loaded"]


def published(airflow: Airflow) -> Path:
    """The file that readers open."""
    return airflow.home / "warehouse" / "spend.duckdb"


def test_the_scheduled_line_leaves_what_a_terminal_leaves_and_knows_that_when_airflow_has_forgotten_all(
    airflow: Airflow, served: Sandbox, migrated: Path, tmp_path: Path
) -> None:
    airflow.connect(served.url)

    first = airflow.test(*LINE)

    assert [run["state"] for run in first] == ["success"] * len(LINE)
    assert first[0]["tasks"]["prices.ask_ahead[1]"] == "success"
    (tmp_path / "terminal").mkdir()
    terminal = settings_for(served.url, tmp_path / "terminal")
    assert pipeline.run(terminal).exit_code == 0
    held = closed_days(published(airflow))
    assert held == closed_days(tmp_path / "terminal" / "spend.duckdb")
    assert all(held.values())
    passed = [str(value) for (value,) in airflow.rows("select value from xcom")]
    assert passed
    assert max(map(len, passed)) < 10_000
    assert not any("fal-ai/" in value for value in passed)
    events = airflow.rows(
        "select uri, asset_event.extra from asset_event join asset on asset.id = asset_id order by 1"
    )
    moved = Counter(uri.removeprefix("faletl://") for uri, _ in events)
    assert moved.keys() >= {
        f"warehouse/{name}" for name in ("raw/usage", "marts", "reports", "published")
    }
    assert moved["warehouse/raw/models"] == 1
    assert any('"rows": ' in extra and f"{TODAY - timedelta(days=1)}" in extra for _, extra in events)

    airflow.forget(migrated)
    asked = len(served.requests)
    again = airflow.test("fal_prices", "fal_usage", "fal_analytics")

    assert [run["state"] for run in again] == ["success"] * 3
    assert again[0]["tasks"]["models.load"] == again[0]["tasks"]["models.extract"] == "skipped"
    assert closed_days(published(airflow)) == held
    starts = {
        request.query["start"][0][:10] for request in served.requests[asked:] if "start" in request.query
    }
    assert starts <= {f"{TODAY}"}  # the open day; whatever is loaded is not asked for again


def test_maintenance_updates_the_assets_only_where_there_is_a_new_build(
    airflow: Airflow, served: Sandbox
) -> None:
    airflow.connect(served.url)
    load_usage(airflow, served)

    first, second = airflow.test("fal_maintain", "fal_maintain")

    assert first["tasks"] == {"maintain": "success", "shown": "success"}
    assert second["tasks"] == {"maintain": "success", "shown": "skipped"}
    (events,) = airflow.rows("select count(*) from asset_event")
    assert events == (3,)  # marts, reports, the published copy
    assert published(airflow).exists()


def test_a_backfill_by_form_loads_the_days_and_resources_that_it_names(
    airflow: Airflow, served: Sandbox
) -> None:
    airflow.connect(served.url)
    start, end = TODAY - timedelta(days=12), TODAY - timedelta(days=10)
    form = {"start": f"{start}", "end": f"{end}", "resources": ["usage", "analytics"]}

    (dry,) = airflow.test({"dag_id": "fal_backfill", "conf": {**form, "dry_run": True}})

    assert dry["state"] == "success"
    assert f"usage: 2 windows, {start} to {end - timedelta(days=1)}, in about 4 calls" in dry["log"]
    assert not (airflow.home / "landing").exists()

    (run,) = airflow.test({"dag_id": "fal_backfill", "conf": form})

    assert run["state"] == "success"
    assert run["tasks"]["prices.load"] == "skipped"
    settings = settings_of(airflow)
    days = Counter(path.parent.name for path in complete_reads(settings))
    assert days == {f"{start}": 2, f"{start + timedelta(days=1)}": 2}


@pytest.mark.parametrize("day", ["2006-11-01", "9999-12-31"])
def test_a_day_of_the_form_that_fal_cannot_have_is_refused_at_once(
    day: str, airflow: Airflow, served: Sandbox
) -> None:
    airflow.connect(served.url)
    form = {"start": day, "resources": ["usage"]}
    [run] = airflow.test({"dag_id": "fal_backfill", "conf": form})
    assert run["tasks"]["usage.plan"] == "failed"
    assert f"--start {day} is out of range" in run["log"]
    assert airflow.rows("select max(try_number) from task_instance") == [(1,)]


def test_a_run_by_hand_fetches_the_days_of_its_interval_anew(airflow: Airflow, served: Sandbox) -> None:
    airflow.connect(served.url)
    noon = f"{TODAY - timedelta(days=20)}T12:30:00+00:00"

    by_hand = {"dag_id": "fal_usage", "logical_date": noon}
    first, _, second = airflow.test(by_hand, "fal_spend", by_hand)

    assert first["state"] == second["state"] == "success"
    assert second["tasks"]["usage.extract[0]"] == "success"
    assert second["tasks"]["usage.load"] == "skipped"  # the same rows again
    settings = settings_of(airflow)
    reads = [path for path in complete_reads(settings) if path.parents[1].name == "usage"]
    assert {path.parent.name for path in reads} == {f"{TODAY - timedelta(days=20)}"}
    assert len(reads) == 2


def test_a_window_that_fails_stops_no_other_and_fails_the_run(airflow: Airflow) -> None:
    yesterday = f"{TODAY - timedelta(days=1)}T00:00:00Z"

    def fault(request: Request) -> Fault | None:
        is_it = request.path == "/models/usage" and yesterday in request.query.get("start", [])
        return Fault(status=400) if is_it else None

    with Sandbox(few(), fault=fault) as server:
        airflow.connect(server.url)
        (run,) = airflow.test("fal_usage")

    tasks = run["tasks"]
    assert run["state"] == "failed"
    assert [tasks[f"usage.extract[{n}]"] for n in range(3)] == ["success", "failed", "success"]
    assert tasks["usage.load"] == "success"
    assert tasks["usage.all_loaded"] == "upstream_failed"
    assert tasks["credits.all_loaded"] == "success"
    assert airflow.rows("select max(try_number) from task_instance") == [(1,)]
    windows = duckdb.connect(airflow.warehouse.removeprefix("duckdb:///"), read_only=True).execute(
        "select count(*) from ops.loads where resource = 'usage'"
    )
    assert windows.fetchone() == (2,)


NO_FORM = {"resources": ["../../etc"], "start": "{{ conn.fal_default.password }}", "dry_run": True}
"""What somebody may give to a DAG without a form: it means nothing there."""


def test_prices_are_read_though_the_catalogue_fails_and_the_run_says_so(airflow: Airflow) -> None:
    def fault(request: Request) -> Fault | None:
        return Fault(status=400) if request.path == "/models" else None

    with Sandbox(few(), fault=fault) as server:
        airflow.connect(server.url)
        load_usage(airflow, server)
        (run,) = airflow.test({"dag_id": "fal_prices", "conf": NO_FORM})

    assert run["state"] == "failed"
    assert run["tasks"]["models.all_loaded"] == "upstream_failed"
    assert run["tasks"]["prices.all_loaded"] == run["tasks"]["prices.load"] == "success"


def test_what_the_gate_refuses_is_told_and_fails_the_run_after_all_else_is_loaded(
    airflow: Airflow, served: Sandbox, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    no_rows = {
        "type": "unexpected_rows_expectation",
        "severity": "critical",
        "kwargs": {"unexpected_rows_query": "select * from {batch}", "description": "no spend at all"},
    }
    (rules / "usage.json").write_text(json.dumps({"name": "usage", "expectations": [no_rows]}))
    airflow.connect(served.url)

    (run,) = airflow.test("fal_usage", FALETL_GATE="1", FALETL_EXPECTATIONS=str(rules))

    assert run["state"] == "failed"
    assert run["tasks"]["usage.all_loaded"] == "failed"
    assert run["tasks"]["billing_events.all_loaded"] == "success"
    assert "refused: usage, window" in run["log"]
    assert "2 windows were not loaded" in run["log"]


def test_a_key_without_analytics_leaves_them_out_with_a_sentence(airflow: Airflow) -> None:
    with Sandbox(few(), keys={FULL_KEY: "BILLING"}) as server:
        airflow.connect(server.url)
        load_usage(airflow, server)
        (analytics,) = airflow.test("fal_analytics")

    assert analytics["state"] == "success"
    assert analytics["tasks"]["analytics.load"] == "skipped"
    assert "FAL_KEY needs models:metrics:read" in analytics["log"]


@pytest.mark.parametrize(
    ("is_taken", "is_split"),
    [(True, False), (False, True)],
    ids=["taken, as password", "refused, as login and password"],
)
def test_no_part_of_a_key_is_left_anywhere_whether_fal_takes_it_or_not(
    airflow: Airflow, is_taken: bool, is_split: bool
) -> None:
    keys = {KEY if is_taken else FULL_KEY: "FULL"}

    def echo(request: Request) -> Fault | None:
        # A fal that tells the key in its errors, or half of it in a header.
        is_it = request.path == "/models/billing-events"
        if is_it:
            return Fault(status=400, body=f"bad key {KEY.split(':')[1]}, Key {KEY}".encode())
        return Fault(headers={"x-fal-request-id": KEY.split(":")[1]})

    with Sandbox(few(), keys=keys, fault=echo) as server:
        airflow.connect(server.url, KEY, is_split=is_split, metrics_api_key=METRICS_KEY)
        (run,) = airflow.test("fal_usage")

    assert run["state"] == "failed"
    if not is_taken:
        sentence = "fal does not accept FAL_KEY for anything: it is mistyped or revoked"
        assert sentence in run["log"]
        assert run["tasks"]["usage.plan"] == "failed"
    assert airflow.rows("select max(try_number) from task_instance") == [(1,)]
    written = everything_in(airflow.home) + run["log"].encode()
    for key in (KEY, METRICS_KEY):
        assert leaks(key, written) == set()


def test_each_connection_is_an_account_with_dags_of_its_own(airflow: Airflow, served: Sandbox) -> None:
    other = few()
    other.account, other.requests = "other", "other/"
    form = {"start": f"{TODAY - timedelta(days=2)}", "end": f"{TODAY}", "resources": ["usage"]}
    with Sandbox(other, keys={truth.OTHER_KEY: "FULL"}) as second:
        airflow.connect(served.url, account="one")
        airflow.connect(second.url, truth.OTHER_KEY, "fal_acme", account="two")
        runs = airflow.test(
            {"dag_id": "fal_backfill", "conf": form},
            {"dag_id": "fal_backfill__acme", "conf": form},
            "fal_spend",
            FALETL_CONNECTIONS="fal_default, fal_acme",
        )
        airflow.connect(second.url, truth.OTHER_KEY, "fal_acme", account="one")
        [swapped] = airflow.test(
            {"dag_id": "fal_backfill__acme", "conf": form}, FALETL_CONNECTIONS="fal_default, fal_acme"
        )

    assert [run["state"] for run in runs] == ["success"] * 3
    with duckdb.connect(str(published(airflow)), read_only=True) as connection:
        spent = connection.execute(
            "select account, sum(cost_total) from reports.rpt_spend_daily group by 1 order by 1"
        ).fetchall()
        bound = connection.execute("select account, usernames from ops.accounts order by 1").fetchall()
    assert [account for account, _ in spent] == ["one", "two"]
    assert spent[0][1] == spent[1][1] > 0
    assert bound == [("one", '["acme"]'), ("two", '["other"]')]
    assert swapped["state"] == "failed"
    assert swapped["tasks"]["usage.plan"] == "failed"
    assert "FALETL_ACCOUNT is 'one', but the key in FAL_KEY is account 'two' here" in swapped["log"]


def test_the_sensor_of_the_deadline_waits_for_the_whole_day(served: Sandbox, tmp_path: Path) -> None:
    settings = settings_for(served.url, tmp_path)
    day = date(2026, 3, 2)
    assert not is_published(settings, day)
    pipeline.run(settings, Asked(day - timedelta(days=1), day, ["usage"]))
    assert not is_published(settings, day)
    pipeline.run(settings, Asked(day, day + timedelta(days=1), ["usage"]))
    assert is_published(settings, day)
