"""The `faletl` command as a person or a scheduler types it: output, sentences, exit codes."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

import duckdb
import pytest
import time_machine

from docs import examples
from faletl import __version__, pipeline
from faletl.cli import demo
from faletl.cli.demo import ANSWERS
from faletl.cli.output import Format, print_query
from faletl.config import Settings
from faletl.errors import UsageError
from faletl.line.report import Report, no_progress
from faletl.resources import RESOURCES
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from tests import truth
from tests.conftest import ask, published_path, settings_for
from tests.forked import Trap, called, environment
from tests.leaks import everything_in, leaks

SUM = "select sum(cost_total) from reports.rpt_spend_daily"
CANARY = "canary-kid-55e0:canary-secret-0123456789"


def faletl(
    *args: str, settings: Settings | None = None, folder: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    env = environment(settings, **more) if settings else {"PATH": os.environ["PATH"], **more}
    return called(args, env, folder or Path.cwd())


def loaded(settings: Settings) -> subprocess.CompletedProcess[str]:
    """A run over the days of the account."""
    return faletl("run", "--start", "2026-11-21", "--end", "2026-11-23", settings=settings)


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a warehouse that was loaded and published once, for tests that only read."""
    with Sandbox(truth.two_days()) as server:
        settings = settings_for(server.url, tmp_path_factory.mktemp("readable"))
        assert loaded(settings).returncode == 0
    return settings


ASKS_AND_BUILDS = {"httpx", "sqlglot", "pandas", "great_expectations", "airflow"}
HEAVY = {*ASKS_AND_BUILDS, "duckdb", "sqlalchemy", "pydantic", "msgspec"}


@pytest.mark.parametrize(("command", "unneeded"), [("--help", HEAVY), ("status", ASKS_AND_BUILDS)])
def test_a_command_imports_nothing_heavy_that_it_does_not_need(
    readable: Settings, command: str, unneeded: set[str]
) -> None:
    probe = (
        f"import sys; sys.argv = ['faletl', {command!r}]\n"
        "from faletl.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end\n"
        f"print('imported', {unneeded!r} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment(readable),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "usage" in done.stdout or "run" in done.stdout
    assert done.stdout.endswith("imported set()\n")
    assert faletl("--version").stdout == f"faletl {__version__}\n"


def test_a_run_tells_what_it_did_and_the_answers_follow(settings: Settings) -> None:
    done = loaded(settings)
    assert done.returncode == 0, done.stderr
    assert "usage: 2 windows (2 loaded), 30 rows" in done.stdout
    assert "published" in done.stdout
    assert "usage, window 2026-11-21: 15 rows, loaded, proof summary" in done.stderr

    spent = sum(one.cost_total for one in truth.two_days().lines)
    query = "select sum(cost_total) as cost_total from reports.rpt_spend_daily"
    as_json = faletl("sql", query, "--format", "json", settings=settings)
    assert json.loads(as_json.stdout, parse_float=Decimal) == [{"cost_total": spent}]
    assert faletl("sql", query, "--format", "csv", settings=settings).stdout == f"cost_total\n{spent}\n"
    assert str(spent) in faletl("sql", query, settings=settings).stdout

    state = json.loads(faletl("status", "--json", settings=settings).stdout)
    usage = next(line for line in state["resources"] if line["resource"] == "usage")
    assert usage["newest_window"] == "2026-11-22T00:00:00Z"
    assert (usage["windows"], usage["rows"], usage["open_failures"]) == (2, 30, 0)
    told = faletl("status", settings=settings).stdout
    assert "serverless and compute are not in these sums" in told


def test_parquet_goes_to_a_pipe(readable: Settings, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-c", "from faletl.cli import main; main()",
            "sql", "from reports.rpt_spend_daily", "--format", "parquet",
        ],
        env=environment(readable),
        capture_output=True,
        check=True,
    )  # fmt: skip
    (tmp_path / "rows.parquet").write_bytes(done.stdout)
    total = duckdb.sql(f"select sum(cost_total) from '{tmp_path / 'rows.parquet'}'").fetchall()
    assert total == [(sum(one.cost_total for one in truth.two_days().lines),)]


NO_SELECTS = (
    "delete from reports.rpt_spend_daily",
    "update reports.rpt_spend_daily set cost_total = 0",
    "insert into reports.rpt_spend_daily select * from reports.rpt_spend_daily",
    "truncate reports.rpt_spend_daily",
    "drop table reports.rpt_spend_daily",
    "alter table reports.rpt_spend_daily add column x int",
    "comment on table reports.rpt_spend_daily is 'x'",
    "create table x as select 1",
    "create schema mine",
    "create secret (type s3)",
    "attach 'other.duckdb'",
    "attach ':memory:' as mine",
    "attach '{published}' as again (read_only false)",
    "copy (select 1) to 'out.csv'",
    "copy (select 1) to '{published}' (format csv, use_tmp_file false)",  # DuckDB would do it
    "copy (select 1) to '{published}.wal' (format csv, use_tmp_file false)",
    "explain analyze copy (select 1) to '{published}' (format csv, use_tmp_file false)",
    "select 1; copy (select 1) to '{published}' (format csv, use_tmp_file false)",
    "select 1) to '{published}' (format csv, use_tmp_file false); copy (select 1",
    "copy reports.rpt_spend_daily from 'host.csv'",
    "export database 'out'",
    "import database 'out'",
    "install httpfs",
    "load httpfs",
    "set enable_external_access = true",
    "reset enable_external_access",
    "set lock_configuration = false",
    "set memory_limit = '1TB'",
    "pragma enable_external_access = true",
    "pragma threads = 64",
    "call enable_logging(storage = 'file', storage_path = 'out')",
    "checkpoint",
    "begin",
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('host.csv')",
    "select * from read_csv('host.csv')",
    "select * from 'host.csv'",
    "select * from read_json('host.csv')",
    "select * from read_parquet('out.parquet')",
    "select * from sniff_csv('host.csv')",
    "select * from glob('/etc/*')",
    "select * from duckdb_secrets()",
    "select getenv('FAL_KEY')",
    "select * from query('drop table reports.rpt_spend_daily')",
    "select nothing from nowhere",
)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_sql_can_only_read_what_is_published(
    form: Format, readable: Settings, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    shown = published_path(readable)
    before = sorted(shown.parent.rglob("*")), shown.read_bytes()
    Path("host.csv").write_text("a,b\n1,secret\n", encoding="utf-8")
    for query in NO_SELECTS:
        with pytest.raises(UsageError, match="the query was refused: "):
            print_query(readable, query.format(published=shown), form)
        assert (sorted(shown.parent.rglob("*")), shown.read_bytes()) == before, query
    assert {path.name for path in tmp_path.rglob("*")} == {"host.csv"}
    for query in ("from reports.rpt_spend_daily", "with spent as (select 1 as a) from spent -- x"):
        print_query(readable, query, form)
    for query in (
        "pivot reports.rpt_spend_daily on unit using sum(cost_total)",
        "describe marts.dim_date",
    ):
        print_query(readable, query, "csv")
    assert capfdbinary.readouterr().out
    assert faletl("sql", NO_SELECTS[0], settings=readable).returncode == 2


def test_csv_cells_cannot_become_formulas(readable: Settings) -> None:
    done = faletl("sql", "select '=1+1' as a, -5 as b", "--format", "csv", settings=readable)
    assert done.stdout == "a,b\n'=1+1,-5\n"
    query = "select 'x;=1+1;  -2; y' as a, ' @x' as b, 'a=b' as c"  # where semicolons split cells
    done = faletl("sql", query, "--format", "csv", settings=readable)
    assert done.stdout == "a,b,c\nx;'=1+1;'  -2; y,' @x,a=b\n"


ODD_TEXT = "esc\x1b[2J bell\x07 c1\x9b bidi\u202e line\nnext\rstart é 🙂"


def test_no_raw_control_character_is_printed(readable: Settings) -> None:
    codes = ", ".join(f"chr({ord(one)})" for one in ODD_TEXT)
    printed = {
        form: faletl("sql", f"select concat({codes}) as a", "--format", form, settings=readable).stdout
        for form in ("table", "csv", "json")
    }
    for form, text in printed.items():
        odd = {one for one in text if not one.isprintable() and one != "\n"}
        assert not odd, form
        assert "é 🙂" in text, form
    assert json.loads(printed["json"]) == [{"a": ODD_TEXT}]
    assert printed["csv"].splitlines()[1:] == [ascii(ODD_TEXT[:-3])[1:-1] + "é 🙂"]


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (["run"], {"FAL_KEY": ""}, "FAL_KEY is not set"),
        (["run"], {"FAL_KEY": "no-colon-here"}, "key_id:secret"),
        (["run", "--start", "2026-11-31"], {}, "'2026-11-31' is not a date"),
        (["run", "--start", "2026-11-02", "--end", "2026-11-02"], {}, "--end is exclusive"),
        (["run", "--start", "2999-01-01"], {}, "--start 2999-01-01 is out of range"),
        (["run", "--start", "2020-12-31"], {}, "name a day from 2021-01-01"),
        (["run", "--start", "0001-01-01", "--end", "0001-01-02"], {}, "out of range"),
        (["run", "--end", "9999-12-31"], {}, "--end 9999-12-31 is out of range"),
        (["run", "--start", "２０２６-11-01"], {}, "is not a date like 2026-11-01"),
        (["run", "--start", "2026-W44-1"], {}, "is not a date like 2026-11-01"),
        (["run", "--start", "20261101"], {}, "is not a date like 2026-11-01"),
        (["extract", "--start", "2006-11-01"], {}, "out of range"),
        (["load", "--start", "9999-12-31"], {}, "out of range"),
        (["validate", "--start", "0001-01-01"], {}, "out of range"),
        (["stage", "--out", "o", "--end", "0001-01-01"], {}, "out of range"),
        (["rebuild", "--window", "9999-12-31"], {}, "--window 9999-12-31 is out of range"),
        (["horizon", "--set", "2020-12-31"], {}, "--set 2020-12-31 is out of range"),
        (["horizon", "--set", "tomorrow"], {}, "is not a date like 2026-11-01"),
        (["horizon", "--resource", "invoices"], {}, "is not one of usage"),
        (["run"], {"FALETL_FIRST_DAYS": "99999999999"}, "FALETL_FIRST_DAYS"),
        (["run"], {"FALETL_ACCOUNT": "x" * 201}, "FALETL_ACCOUNT: must be a printable label"),
        (["accounts", "rename", "a", "b"], {}, "there is no account yet"),
        (["accounts", "forget", "a"], {}, "there is no account yet"),
        (["run", "--resource", "invoices"], {}, "is not one of usage"),
        (["run"], {"FALETL_API_URL": "http://192.0.2.1/v1"}, "plain http"),
        (["run"], {"FALETL_API_URL": "file:///etc/passwd"}, "https://"),
        (["run"], {"FALETL_WAREHOUSE": "mysql://x/y"}, "faletl does not support 'mysql'"),
        (["run"], {"FALETL_PARALLEL": "many"}, "FALETL_PARALLEL"),
        (["sql", "select 1"], {}, "nothing is published yet"),
        (["fly"], {}, "No such command"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_2(
    args: list[str], env: dict[str, str], said: str, settings: Settings, tmp_path: Path
) -> None:
    done = faletl(*args, settings=settings, folder=tmp_path, **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "no-colon-here" not in done.stderr


def test_a_newer_warehouse_is_refused_with_a_sentence(settings: Settings) -> None:
    loaded(settings)
    path = settings.warehouse.removeprefix("duckdb:///")
    with duckdb.connect(path) as connection:
        connection.execute("update ops.warehouse set schema_version = 999")
    for command in ("run", "status", "build"):
        done = faletl(command, settings=settings)
        assert done.returncode == 2
        assert "upgrade faletl" in done.stderr


@pytest.mark.parametrize("content", [b"not a database", b"\0" * 4096])
def test_a_foreign_file_is_left_alone(content: bytes, settings: Settings) -> None:
    path = Path(settings.warehouse.removeprefix("duckdb:///"))
    path.write_bytes(content)
    done = faletl("run", settings=settings)
    assert done.returncode == 4
    assert "cannot be opened" in done.stderr
    assert path.read_bytes() == content


def test_a_window_that_fails_is_told_and_the_others_load(tmp_path: Path) -> None:
    def refuse_the_21st(request: Request) -> Fault | None:
        is_it = request.query.get("start") == ["2026-11-21T00:00:00Z"]
        is_rows = request.path == "/models/usage" and request.query["expand"] != ["summary"]
        return Fault(body=b'{"error": {"message": "no data"}}') if is_it and is_rows else None

    with Sandbox(truth.two_days(), fault=refuse_the_21st) as server:
        settings = settings_for(server.url, tmp_path)
        done = loaded(settings)
        assert done.returncode == 3
        failed = [line for line in done.stderr.splitlines() if line.startswith("faletl: ")]
        assert len(failed) == 1
        assert failed[0].startswith("faletl: usage, window 2026-11-21, page 1: ")
        assert "(fal request " in failed[0]
        state = json.loads(faletl("status", "--json", settings=settings).stdout)
        assert [line["open_failures"] for line in state["resources"] if line["resource"] == "usage"] == [
            1
        ]
        assert state["failures"][0]["message"] in failed[0]
    with Sandbox(truth.two_days()) as server:
        healed = settings_for(server.url, tmp_path)
        assert loaded(healed).returncode == 0
        state = json.loads(faletl("status", "--json", settings=healed).stdout)
        assert state["failures"] == []


def test_errors_can_be_read_by_machines(tmp_path: Path) -> None:
    with Sandbox(truth.two_days()) as server:
        settings = settings_for(server.url, tmp_path)
        done = faletl("--log-format", "json", "run", settings=settings, FAL_KEY="un:known-key")
    last = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == 2
    assert last["error"] == "KeyRefusedError"
    assert (last["status"], last["is_retryable"]) == (401, False)
    assert last["resource"] in RESOURCES  # whichever asked first


def test_accounts_and_horizons_are_shown_renamed_moved_and_forgotten(tmp_path: Path) -> None:
    rows = ("sql", "select count(*) from raw.usage", "--format", "csv")
    with Sandbox(truth.two_days()) as server:
        settings = settings_for(server.url, tmp_path)
        nobody = "there is no account yet; run faletl run first\n"
        assert faletl("accounts", settings=settings).stdout == nobody
        assert "there is no horizon yet" in faletl("horizon", settings=settings).stdout
        assert loaded(settings).returncode == 0
        listed = faletl("accounts", "list", settings=settings).stdout
        assert re.search(r"^acme +acme +1 +sandbox +\S+Z +2026-11-21 +\S+$", listed, re.MULTILINE)
        assert faletl("accounts", settings=settings).stdout == listed
        shown = faletl("horizon", "--resource", "usage", settings=settings).stdout
        assert re.search(r"^acme +usage +2026-11-21$", shown, re.MULTILINE)
        assert "billing_events" not in shown
        moved = faletl("horizon", "--set", "2026-11-22", settings=settings)
        assert (moved.returncode, moved.stderr) == (0, "")
        assert len(re.findall("2026-11-22", moved.stdout)) == 3
    renamed = faletl("accounts", "rename", "acme", "emea", settings=settings)
    assert renamed.returncode == 0, renamed.stderr
    assert "account acme is now emea" in renamed.stdout
    assert "published" in renamed.stdout
    before = faletl(*rows, settings=settings).stdout
    refused = faletl("accounts", "forget", "emea", settings=settings)
    assert refused.returncode == 2
    told = r"this would delete account 'emea': \d+ rows of 3 days, 2026-11-21 to \S+; add --yes"
    assert re.search(told, refused.stderr)
    assert faletl(*rows, settings=settings).stdout == before
    assert faletl("accounts", "forget", "emea", "--yes", settings=settings).returncode == 0
    assert faletl("accounts", settings=settings).stdout == nobody
    assert faletl("rebuild", settings=settings).returncode == 0
    assert faletl(*rows, settings=settings).stdout.endswith("\n0\n")


def test_days_up_to_an_end_are_due_without_a_start(tmp_path: Path) -> None:
    with Sandbox(truth.two_days()) as server:
        settings = settings_for(server.url, tmp_path)
        dry = faletl(
            "run", "--end", "2026-11-23", "--dry-run", settings=settings, CLOCK=truth.NOW.isoformat()
        )
    assert re.search(r"^usage +2 +2026-11-21 … 2026-11-22 +4$", dry.stdout, re.MULTILINE), dry.stdout


@pytest.mark.xdist_group("demo")
def test_demo_answers_and_keeps_to_its_own_folder(tmp_path: Path) -> None:
    """When it is called again, two hours later; docs/examples.py calls it first."""
    folder = Path(examples.warehouse().warehouse.removeprefix("duckdb:///")).parent
    shutil.copytree(folder, tmp_path / "faletl-demo")
    later = (examples.SHOWN_AT + timedelta(hours=2)).isoformat()
    done = faletl(
        "demo", folder=tmp_path, FAL_KEY=CANARY, FALETL_WAREHOUSE="duckdb:///real.duckdb", CLOCK=later
    )
    assert "usage, window 2026-11-24T00:00:00Z/2026-11-24T13:00:00Z" in done.stderr
    assert done.returncode == 0, done.stderr
    for expected in (
        "USD",
        "█",
        "fal-ai/",
        "Model APIs only",
        *(question for question, _ in ANSWERS),
        "spend.duckdb",
        "Try next",
    ):
        assert expected in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"faletl-demo"}
    assert FULL_KEY not in done.stdout + done.stderr
    assert leaks(CANARY, everything_in(tmp_path) + done.stdout.encode()) == set()

    inside = tmp_path / "faletl-demo"
    for command in (["status"], ["sql", SUM], ["verify"], ["accounts"], ["landing", "du"]):
        done = faletl(*command, folder=inside, CLOCK=later)
        assert done.returncode == 0, done.stderr
    assert faletl("verify", folder=inside).stdout.endswith("sums and models are unchanged\n")
    for command in (["run"], ["extract"], ["check"], ["estimate", "fal-ai/veo3.1=1"]):
        for key in ("", CANARY):
            done = faletl(*command, folder=inside, FAL_KEY=key, CLOCK=later)
            assert done.returncode == 2
            assert "start faletl sandbox" in done.stderr


class Interrupted(BaseException):
    """Ctrl-C."""


def interrupt() -> NoReturn:
    """Have it pressed."""
    raise Interrupted


@pytest.mark.duckdb_only("the demo keeps a file")
def test_a_demo_that_is_interrupted_ends_with_the_answers_of_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def world(now: Callable[[], datetime], **_: object) -> truth.Account:
        account = truth.Account("sandbox", [truth.line(at, truth.FLUX, "3") for at in used])
        account.catalogue = [{"endpoint_id": truth.FLUX}]
        account.list_price(truth.FLUX, "0.022" if now() < used[-1] else "0.025")
        return account

    settings_of = demo._settings
    used = [datetime(2026, month, 1, 7, tzinfo=UTC) for month in (10, 11)]
    monkeypatch.setattr(
        demo, "_settings", lambda folder, **given: settings_of(folder, gate=False, **given)
    )
    monkeypatch.setattr(demo, "invented_world", world)
    with time_machine.travel(datetime(2026, 11, 1, 11, 10, tzinfo=UTC), tick=True):
        undisturbed, _ = demo.run(tmp_path / "undisturbed", no_progress)
        for function, nth in (
            ("faletl.fal.client.FalClient.get", 1),
            ("faletl.landing.extracts.leave_receipt", 1),  # the catalogue of then is loaded,
            ("faletl.landing.extracts.leave_receipt", 1),  # and now the prices of then
            ("faletl.landing.extracts.leave_receipt", 9),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(function, pkgutil.resolve_name(function))  # to be put back
                Trap(function, nth=nth, springs=interrupt)()
                with pytest.raises(Interrupted):
                    demo.run(tmp_path / "disturbed", no_progress)
        disturbed, report = demo.run(tmp_path / "disturbed", no_progress)
    assert report.exit_code == 0
    assert ask(undisturbed, "select count(*) from reports.rpt_price_changes") == [(1,)]
    for _, query in ANSWERS:
        assert ask(disturbed, query) == ask(undisturbed, query), query


def test_a_demo_leaves_a_folder_in_use_as_it_is(tmp_path: Path) -> None:
    for name in ("notes.txt", "warehouse.duckdb", "faletl.duckdb"):
        (folder := tmp_path / name.partition(".")[0]).mkdir()
        (folder / name).write_bytes(b"mine")
        (folder / "owners.csv").write_bytes(b"mine, too")
        done = faletl("demo", "--folder", str(folder))
        assert done.returncode == 2
        assert "not of a demo" in done.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: b"mine", "owners.csv": b"mine, too",
        }  # fmt: skip
    done = faletl("demo", "--folder", str(tmp_path / "notes" / "notes.txt"))
    assert done.returncode == 2


@pytest.mark.duckdb_only("the demo keeps a file")
def test_the_folder_of_an_older_demo_is_taken_over_and_a_real_warehouse_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = truth.two_days()
    with Sandbox(account) as server, time_machine.travel(truth.NOW, tick=False):
        for name, is_taken in (("sandbox", True), ("acme", False)):
            folder = tmp_path / name
            folder.mkdir()
            account.account = name
            pipeline.run(settings_for(server.url, folder))
            (folder / "owners.csv").write_text("account,credential_id,owner,team,cost_centre\n")
            before = (folder / "warehouse.duckdb").read_bytes()
            monkeypatch.setattr(demo, "_load", lambda folder, *_: (demo._settings(folder), Report("x")))
            if is_taken:
                settings, _ = demo.run(folder, no_progress)
                assert ask(settings, "select min(usage_date) from reports.rpt_spend_daily") == [
                    (truth.day(21),)
                ]
                assert not (folder / "warehouse.duckdb").exists()
                assert (folder / "faletl.duckdb").exists()
            else:
                with pytest.raises(UsageError, match="not of a demo"):
                    demo.run(folder, no_progress)
                assert (folder / "warehouse.duckdb").read_bytes() == before


def test_what_landed_is_pruned_verified_and_rebuilt_from_a_terminal(tmp_path: Path) -> None:
    account = truth.two_days()
    with Sandbox(account, page_size=4) as server:
        settings = settings_for(server.url, tmp_path)
        days = ("--start", "2026-11-21", "--end", "2026-11-23")
        dry = faletl("run", *days, "--dry-run", settings=settings)
        assert dry.returncode == 0
        assert re.search(r"^usage +2 +2026-11-21 … 2026-11-22 +4$", dry.stdout, re.MULTILINE)
        assert re.search(r"\d+ windows, about \d+ calls, 0.\d minutes", dry.stdout)
        assert not (tmp_path / "landing").exists()
        assert loaded(settings).returncode == 0
        for quantity in ("7", "8"):
            account.lines[0] = truth.line(account.lines[0].hour, truth.FLUX, quantity)
            assert loaded(settings).returncode == 0
    spent = faletl("sql", SUM, "--format", "csv", settings=settings).stdout
    told = faletl("status", settings=settings).stdout
    assert re.search(r"Restated since their days closed: \d lines of usage on 1 days of acme, \+", told)
    state = json.loads(faletl("status", "--json", settings=settings).stdout)
    assert {one["resource"] for one in state["restatements"]} == {"usage", "billing_events"}

    du = faletl("landing", "du", settings=settings)
    assert re.search(r"^acme +usage +\d+ +[\d,]+ +\d+ +[\d,]+$", du.stdout, re.MULTILINE), du.stdout
    told = faletl("landing", "prune", "--dry-run", settings=settings).stdout
    assert "would be deleted" in told
    pruned = faletl("landing", "prune", settings=settings).stdout
    assert pruned.replace("deleted", "would be deleted") == told

    lost = settings.model_copy(update={"warehouse": f"duckdb:///{tmp_path / 'typo.duckdb'}"})
    du = faletl("landing", "du", settings=lost)
    assert du.returncode == 0
    assert "so none is deleted; check FALETL_WAREHOUSE" in du.stdout
    assert faletl("landing", "prune", settings=lost).returncode == 2
    assert faletl("maintain", settings=lost).returncode == 2
    for options, heading in ((("--dry-run",), "would be deleted"), ((), "deleted")):
        freed = faletl("maintain", *options, settings=settings)
        assert freed.returncode == 0, freed.stderr
        assert re.match(rf"{heading} +rows +files +bytes\n", freed.stdout)
        assert re.search(r"^superseded extracts +0 +0 +0$", freed.stdout, re.MULTILINE)

    for command in (["rebuild"], ["rebuild", "--window", "2026-11-21"], ["verify"]):
        done = faletl(*command, settings=settings)
        assert done.returncode == 0, done.stderr
    assert faletl("sql", SUM, "--format", "csv", settings=settings).stdout == spent
    with duckdb.connect(str(tmp_path / "warehouse.duckdb")) as connection:
        connection.execute("update marts.fct_usage set cost_total = 0 where usage_date = '2026-11-21'")
    found = faletl("verify", settings=settings)
    assert found.returncode == 4
    assert "marts.fct_usage, 2026-11-21" in found.stderr
    assert "faletl build --full" in found.stderr


def test_what_is_loaded_is_handed_to_other_engines_and_roles(readable: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = faletl("stage", "--out", str(out), "--resource", "usage", settings=readable)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 2 files written, 0 unchanged, 0 deleted\n"
    assert len(list(out.glob("usage/account=acme/day=2026-11-2?/*.parquet"))) == 2
    refused = faletl("grant", "--reader", "analysts", settings=readable)
    assert refused.returncode == 2
    assert "a DuckDB warehouse has no roles; give readers the published copy" in refused.stderr


def test_commands_on_nothing_say_so(tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:9", tmp_path)
    for command, told in (
        (["landing", "du"], "nothing has landed"),
        (["landing", "prune"], "0 extracts, 0 bytes deleted"),
        (["maintain"], "nothing to build"),
        (["rebuild"], "no landed page was ever loaded"),
    ):
        done = faletl(*command, settings=settings)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    for command, told in (
        (["verify"], "faletl: nothing is loaded yet; run faletl run first\n"),
        (["rebuild", "--window", "2026-11-21"],
         "faletl: there is no warehouse yet; run faletl rebuild without --window\n"),
    ):  # fmt: skip
        done = faletl(*command, settings=settings)
        assert done.returncode == 2
        assert done.stderr == told
    assert not (tmp_path / "warehouse.duckdb").exists()
