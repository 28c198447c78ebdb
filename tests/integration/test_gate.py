"""The gate: what refuses a window, what is only recorded, and what a person can see of it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import DataRefusedError, SettingsError
from faletl.line.release import build_and_publish
from faletl.line.report import Report
from faletl.operations.validate import validate
from faletl.operations.validation_html import write_docs
from faletl.resources import RESOURCES
from faletl.sandbox import Fault, Request, Sandbox
from faletl.selection import Asked
from tests import truth
from tests.conftest import ask, opened, settings_for, total
from tests.forked import called
from tests.integration.test_run import is_summary, one_row, summary
from tests.truth import Account, line

DAYS = Asked(truth.day(21), truth.day(23))

FAILED = """
    select resource, window_start::date::varchar, severity, expectation, unexpected_count
    from ops.validations where not success order by all
"""


@pytest.fixture
def settings(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of a run against the served account, with the gate."""
    return settings_for(sandbox.url, tmp_path, gate=True)


def failed(settings: Settings, resource: str | None = None) -> list[tuple[Any, ...]]:
    """What was not as expected, by what is published."""
    return [row for row in ask(settings, FAILED) if resource in (None, row[0])]


def own(settings: Settings, **suites: list[dict[str, Any]]) -> Settings:
    """The settings, with expectations of the user's own."""
    folder = Path(settings.landing).parent / "expectations"
    folder.mkdir(exist_ok=True)
    for resource, expectations in suites.items():
        (folder / f"{resource}.json").write_text(json.dumps({"expectations": expectations}))
    return settings.model_copy(update={"expectations": folder})


# --- What is expected of every window -------------------------------------------------------------


def test_all_that_is_loaded_was_looked_at(clock: time_machine.Traveller, settings: Settings) -> None:
    report = pipeline.run(settings)
    assert report.exit_code == 0
    looked_at = "select distinct load_id, account, resource, window_start from ops.validations"
    loads = "select load_id, account, resource, window_start from ops.loads"
    assert sorted(ask(settings, looked_at)) == sorted(ask(settings, loads))
    assert {
        resource for resource, *_ in ask(settings, "select distinct resource from ops.validations")
    } == (set(RESOURCES))
    assert ask(settings, "select distinct severity from ops.validations order by 1") == [
        ("critical",), ("info",), ("warning",)
    ]  # fmt: skip
    assert [row for row in failed(settings) if row[2] != "info"] == []
    assert ask(settings, "select distinct run_id from ops.validations") == [(report.run_id,)]


def test_an_unknown_unit_is_loaded_and_told(
    clock: time_machine.Traveller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = truth.two_days()
    account.lines.append(line(datetime(2026, 11, 22, 7, tzinfo=UTC), unit="parsec's {x}"))
    with Sandbox(account, page_size=4) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        assert pipeline.run(settings, DAYS).exit_code == 0
    assert total(settings) == sum(one.cost_total for one in account.lines)
    [(*_, unexpected)] = [row for row in failed(settings, "usage") if "table of units" in row[3]]
    assert unexpected == 1
    assert "expected that unit is in the table of units, but 1 row does not meet this" in caplog.text
    [(keys,)] = ask(
        settings,
        "select sample_keys from ops.validations where resource = 'usage' and not success "
        "and severity = 'warning'",
    )
    [key] = json.loads(keys)
    assert key["endpoint_id"] == truth.FLUX
    assert key["bucket"] == "2026-11-22T07:00:00+00:00"
    page, row = key["_page"], key["_row"]
    assert ask(settings, f"select unit from raw.usage where _page = {page} and _row = {row} "
                         "and bucket = '2026-11-22 07:00:00Z'") == [("parsec's {x}",)]  # fmt: skip


def test_a_price_far_from_its_own_history_is_told(clock: time_machine.Traveller, tmp_path: Path) -> None:
    account = truth.two_days()
    account.lines.append(line(datetime(2026, 11, 22, 7, tzinfo=UTC), unit_price="25"))
    account.lines.append(line(datetime(2026, 11, 22, 8, tzinfo=UTC), unit_price="0.07"))
    with Sandbox(account, page_size=4) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        for day in (21, 22):
            days = Asked(truth.day(day), truth.day(day + 1), ["usage"])
            assert pipeline.run(settings, days).exit_code == 0
    told = [row for row in failed(settings) if "unit_price is within" in row[3]]
    assert [(row[1], row[2], row[4]) for row in told] == [("2026-11-22", "warning", 1)]


@pytest.mark.parametrize(
    ("usual", "endpoints", "is_told"), [(1, 10, False), (1, 11, True), (11, 1, True)]
)
def test_a_volume_far_from_that_of_the_same_weekday_is_told_and_loaded(
    usual: int, endpoints: int, is_told: bool, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = Account()
    for day, count in ((1, usual), (8, usual), (15, usual), (22, endpoints)):
        at = datetime(2026, 11, day, tzinfo=UTC)
        account.lines += [
            line(at + timedelta(hours=hour), f"{truth.FLUX}/{number}")
            for hour in range(24)
            for number in range(count)
        ]
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        for day in (1, 8, 15, 22):
            days = Asked(truth.day(day), truth.day(day + 1), ["usage"])
            assert pipeline.run(settings, days).exit_code == 0
    told = [row[1:3] for row in failed(settings) if "of the usual" in row[3]]
    assert told == ([("2026-11-22", "warning")] if is_told else [])
    assert total(settings) == sum(one.cost_total for one in account.lines)


def test_charges_that_do_not_add_up_to_usage_are_told_when_the_day_is_settled(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    account.events = [
        one for one in truth.charges(account.lines) if one.timestamp.date() != truth.day(21)
        or one.endpoint_id != truth.VOICE
    ]  # fmt: skip
    with Sandbox(account, page_size=4) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        assert pipeline.run(settings, DAYS).exit_code == 0
    told = [row[1:3] for row in failed(settings, "billing_events") if "fal's own total" in row[3]]
    assert told == [("2026-11-21", "warning")]


def test_a_window_is_looked_at_and_nothing_else(
    clock: time_machine.Traveller, settings: Settings, account: Account
) -> None:
    # An expectation that holds for one day alone would fail if rows of another were looked at.
    only = [
        {
            "type": "expect_column_min_to_be_between",
            "kwargs": {"column": "bucket", "min_value": "2026-11-22 00:00:00Z"},
            "severity": "warning",
            "description": "it is the 22nd",
        }
    ]
    mine = own(settings, usage=only)
    assert pipeline.run(mine, Asked(truth.day(21), truth.day(23), ["usage"])).exit_code == 0
    assert [row[1] for row in failed(settings) if row[3] == "it is the 22nd"] == ["2026-11-21"]


# --- What refuses a window ------------------------------------------------------------------------

NO_VIDEO = {
    "type": "expect_column_values_to_not_be_in_set",
    "kwargs": {"column": "endpoint_id", "value_set": [truth.VIDEO]},
    "severity": "critical",
    "description": "nobody makes videos",
}


def test_a_critical_expectation_refuses_its_window_and_no_other(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    account.lines = [
        one for one in account.lines if one.hour.day == 22 or one.endpoint_id != truth.VIDEO
    ]
    assert pipeline.run(settings, Asked(truth.day(21), truth.day(23), ["usage"])).exit_code == 0
    before = ask(settings, "select * exclude (_load_id, _page, _row) from raw.usage order by all")

    clock.shift(3600)
    account.lines.append(line(datetime(2026, 11, 22, 9, tzinfo=UTC)))
    account.lines.append(line(datetime(2026, 11, 21, 9, tzinfo=UTC)))
    mine = own(settings, usage=[NO_VIDEO])
    report = pipeline.run(mine, Asked(truth.day(21), truth.day(23), ["usage"]))
    assert report.exit_code == 3
    [(task, error)] = report.failures
    assert isinstance(error, DataRefusedError)
    assert task is not None
    assert str(error).startswith(
        "usage, window 2026-11-22: the gate refuses the window: expected that nobody makes videos, but "
        "3 rows do not meet this, such as "
    )
    after = ask(settings, "select * exclude (_load_id, _page, _row) from raw.usage order by all")
    assert len(after) == len(before) + 1  # the 21st was loaded, the 22nd is as it was
    assert set(before) <= set(after)
    [refused] = [row for row in failed(settings) if row[3] == "nobody makes videos"]
    assert refused[1:] == ("2026-11-22", "critical", "nobody makes videos", 3)
    failures = "select resource, error from ops.failures"
    assert ask(settings, failures) == [("usage", "DataRefusedError")]

    # Once it is expected no more, the window is loaded from where it landed.
    assert pipeline.load(settings).exit_code == 0
    build_and_publish(settings, Report("run"))
    assert total(settings) == sum(one.cost_total for one in account.lines)


def test_the_example_of_the_documents_works(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text("utf-8")
    [example] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    at = datetime(2026, 11, 21, 9, tzinfo=UTC)
    account.lines = [one for one in account.lines if one.endpoint_id != "fal-ai/veo3.1"]
    account.lines.append(line(at, "fal-ai/veo3.1"))
    account.lines.append(line(at + timedelta(days=1), quantity="2001", credential=truth.LOGIN))
    mine = own(settings, usage=json.loads(example)["expectations"])
    report = pipeline.run(mine, Asked(truth.day(21), truth.day(23), ["usage"]))
    assert [str(error).split(": ")[0] for _, error in report.failures] == ["usage, window 2026-11-21"]
    assert [row[1:4] for row in failed(settings) if row[2] != "info"] == [
        ("2026-11-21", "critical", "only endpoints that legal approved are used"),
        ("2026-11-22", "warning", "no login spends more than 50 a day"),
    ]


def test_an_expectation_that_cannot_be_told_refuses_when_it_is_critical(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    wrong = {"type": "unexpected_rows_expectation",
             "kwargs": {"unexpected_rows_query": "select nothing from {batch}"}}  # fmt: skip
    report = pipeline.run(own(settings, usage=[wrong]), Asked(truth.day(22), truth.day(23), ["usage"]))
    assert report.exit_code == 3
    assert "it cannot be evaluated" in str(report.failures[0][1])
    assert "nothing" in str(report.failures[0][1])


READING = " where (select count(*) from {{batch}}) >= 0"
ENDING = "select 1 from {{{{batch}}}} where false) as q; {}; select count(*) from (select 1 where false"

HOSTILE = {
    "reads a file": "select content from read_text('{secret}')" + READING,
    "reads a file of rows": "select 1 from read_csv('{secret}')" + READING,
    "lists files": "select file from glob('{folder}/*')" + READING,
    "writes a file": ENDING.format("copy (select 'owned') to '{folder}/owned.pth'"),
    "makes a table": ENDING.format("create table owned as select 1"),
    "attaches a database": ENDING.format("attach '{folder}/owned.duckdb'"),
    "unlocks": ENDING.format("set enable_external_access = true"),
    "installs": ENDING.format("install httpfs"),
}


@pytest.mark.parametrize("sql", HOSTILE.values(), ids=list(HOSTILE))
def test_a_suite_reaches_nothing_but_the_rows_of_its_window(
    sql: str, clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    secret = folder / "secret.txt"
    secret.write_text("a secret of the host")
    query = sql.format(secret=secret, folder=folder)
    hostile = {"type": "unexpected_rows_expectation", "severity": "warning",
               "kwargs": {"unexpected_rows_query": query, "description": "hostile"}}  # fmt: skip
    harmless = {"type": "unexpected_rows_expectation", "severity": "warning",
                "kwargs": {"unexpected_rows_query": "select * from {batch} where cost_total < 0",
                           "description": "harmless"}}  # fmt: skip
    report = pipeline.run(own(settings, usage=[hostile, harmless]), DAYS)
    assert report.exit_code == 0
    kept = "select distinct expectation, success, observed, sample_keys from ops.validations"
    found = ask(settings, kept, opened)
    hostile_ones = [row[1:] for row in found if row[0] == "hostile"]
    assert hostile_ones
    for success, observed, keys in hostile_ones:
        assert not success
        assert "it cannot be evaluated" in observed
        assert "a secret of the host" not in f"{observed}{keys}"
    assert {row[1] for row in found if row[0] == "harmless"} == {True}
    assert [path.name for path in folder.iterdir()] == ["secret.txt"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("usage.json", "no JSON"),
        ("usage.json", "{}"),
        ("usage.json", '{"expectations": [{"type": "expect_miracles", "kwargs": {}}]}'),
        ("billing.json", '{"expectations": []}'),
    ],
)
def test_a_file_that_is_no_suite_ends_the_run(
    name: str, text: str, clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "expectations").mkdir()
    (tmp_path / "expectations" / name).write_text(text)
    mine = settings.model_copy(update={"expectations": tmp_path / "expectations"})
    report = pipeline.run(mine, DAYS)
    assert report.exit_code == 2
    assert any(isinstance(error, SettingsError) and name in str(error) for _, error in report.failures)


# --- faletl validate ------------------------------------------------------------------------------


def test_what_is_loaded_can_be_looked_at_again(
    clock: time_machine.Traveller, account: Account, settings: Settings
) -> None:
    pipeline.run(settings)
    found = validate(settings)
    assert found.exit_code == 0
    loads = ask(settings, "select load_id from ops.loads where is_current")
    assert sorted(one.load_id for one in found.judged) == sorted(load_id for (load_id,) in loads)
    some = validate(settings, Asked(truth.day(21), truth.day(22), ["usage", "billing_events"]))
    assert [(one.resource, str(one.window)) for one in some.judged] == [
        ("usage", "2026-11-21"), ("billing_events", "2026-11-21")
    ]  # fmt: skip


def test_a_day_that_adds_up_later_is_compared_with_the_later_total(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    today = "2026-11-23T00:00:00Z"
    account = one_row()
    account.lines = [line(datetime.fromisoformat(today))]
    is_behind = [True]

    def fault(request: Request) -> Fault | None:
        return summary("7") if is_behind[0] and is_summary(request, today) else None

    with Sandbox(account, fault=fault) as server:
        settings = settings_for(server.url, tmp_path)
        pipeline.run(settings, Asked(resources=["usage"]))
        is_behind[0] = False
        clock.shift(86_400)
        report = pipeline.run(settings, Asked(truth.day(23), truth.day(24), ["usage"]))
    assert [one.outcome for one in report.outcomes] == ["unchanged"]
    totals = "select proof, control_total from ops.loads where window_start = '2026-11-23 00:00:00Z'"
    assert ask(settings, totals) == [("summary", Decimal("0.025"))]
    assert validate(settings).exit_code == 0


def test_rows_that_were_lost_from_the_warehouse_are_found(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    pipeline.run(settings)
    with opened(settings) as connection:
        connection.execute(
            "delete from raw.usage where bucket = '2026-11-22 07:00:00Z' and unit = 'second'"
        )
        connection.execute("update raw.usage set quantity = -1 where bucket = '2026-11-21 07:00:00Z'")
    found = validate(settings, Asked(resources=["usage"]))
    assert found.exit_code == 3
    with opened(settings) as connection:
        kept = connection.execute(FAILED).fetchall()
    assert {row[1:4] for row in kept if row[2] == "critical"} == {
        ("2026-11-21", "critical", "numbers are within their valid range"),
        ("2026-11-22", "critical", "cost_total adds up to fal's own total"),
        ("2026-11-22", "critical", "no row is lost and no row is added"),
    }


def test_the_pages_need_nothing_from_anywhere_and_show_what_fal_sent_as_text(
    clock: time_machine.Traveller, tmp_path: Path
) -> None:
    account = truth.two_days()
    account.lines.append(
        line(datetime(2026, 11, 22, 7, tzinfo=UTC), "<script>alert(1)</script>", unit="parsec")
    )
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        assert pipeline.run(settings, DAYS).exit_code == 0
    index = write_docs(tmp_path / "docs", validate(settings))
    pages = {path.name: path.read_text("utf-8") for path in (tmp_path / "docs").iterdir()}
    assert index.name in pages
    assert set(pages) == {"index.html", *(f"{name}.html" for name in RESOURCES)}
    for page in pages.values():
        assert "<script" not in page
        assert re.search(r"(src|href)=\"?(https?:)?//", page) is None
    assert "&lt;script&gt;alert(1)" in pages["usage.html"]
    assert "unit is in the table of units" in pages["index.html"]


def test_the_command_tells_what_it_found(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path
) -> None:
    pipeline.run(settings, DAYS)

    def faletl(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        given = {"FALETL_WAREHOUSE": settings.warehouse, "FALETL_LANDING": settings.landing, **more}
        return called(arguments, given, tmp_path)

    done = faletl("validate", "--resource", "usage", "--docs", str(tmp_path / "docs"))
    assert done.returncode == 0
    assert re.search(r"usage +2 +30 ", done.stdout)
    assert f"wrote {tmp_path / 'docs' / 'index.html'}" in done.stdout
    refused = faletl(
        "validate", "--start", "2026-11-22", "--end", "2026-11-23",
        FALETL_EXPECTATIONS=str(own(settings, usage=[NO_VIDEO]).expectations),
    )  # fmt: skip
    assert refused.returncode == 3
    assert "expected that nobody makes videos, but 3 rows do not meet this" in refused.stderr
    assert "Traceback" not in refused.stderr
    none = faletl("validate", FALETL_WAREHOUSE=f"duckdb:///{tmp_path / 'none.duckdb'}")
    assert none.returncode == 2


# --- What it costs --------------------------------------------------------------------------------


def test_nothing_is_sent_to_anybody_and_no_file_is_left(
    clock: time_machine.Traveller, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        connected.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert pipeline.run(settings).exit_code == 0
    write_docs(tmp_path / "docs", validate(settings))
    assert {address[0] for address in connected} == {"127.0.0.1"}
    assert list((tmp_path / "tmp").iterdir()) == []


def test_great_expectations_is_not_imported_where_nothing_is_news(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    days = Asked(truth.day(21), truth.day(23), ["usage"])
    assert pipeline.run(settings, days).exit_code == 0
    script = f"""
import sys
from datetime import date
from faletl import pipeline
from faletl.config import Settings
from faletl.line.plan import Asked
settings = Settings.isolated(key="id:secret", api_url={settings.api_url!r},
    warehouse={settings.warehouse!r}, landing={settings.landing!r}, rate=0)
report = pipeline.run(settings, Asked(date(2026, 11, 21), date(2026, 11, 23), ["usage"]))
heavy = {{"great_expectations", "pandas", "numpy", "pyarrow"}}
print([outcome.outcome for outcome in report.outcomes], heavy & set(sys.modules))
"""
    script = script.replace('"id:secret"', repr(settings.key_for()))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['unchanged', 'unchanged'] set()"


def test_without_the_gate_nothing_is_validated(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    report = pipeline.run(settings.model_copy(update={"gate": False}))
    assert report.exit_code == 0
    assert ask(settings, "select count(*) from ops.validations") == [(0,)]
    assert validate(settings).exit_code == 0


def test_amounts_are_compared_exactly(clock: time_machine.Traveller, tmp_path: Path) -> None:
    account = Account()
    at = datetime(2026, 11, 22, 7, tzinfo=UTC)
    account.lines = [line(at, unit_price="0.000000001"), line(at, truth.VIDEO, "90071992547409", "1")]
    with Sandbox(account) as server:
        settings = settings_for(server.url, tmp_path, gate=True)
        assert pipeline.run(settings, Asked(truth.day(22), truth.day(23), ["usage"])).exit_code == 0
    assert total(settings) == Decimal("90071992547409.000000001")
    with opened(settings) as connection:
        connection.execute("update ops.loads set control_total = control_total + 0.0000000021")
    found = validate(settings)
    assert found.exit_code == 3
    [wrong] = [
        v for one in found.judged for v in one.validations if v.severity == "critical" and not v.success
    ]
    assert wrong.expectation == "cost_total adds up to fal's own total"
