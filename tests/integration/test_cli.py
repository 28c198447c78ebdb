"""The `faletl` command as a person or a scheduler types it: output, sentences, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from docs import examples
from faletl import __version__
from faletl.answers import Format, print_query
from faletl.config import Settings
from faletl.demo import ANSWERS
from faletl.errors import UsageError
from faletl.resources import RESOURCES
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from tests import truth
from tests.conftest import published_path, settings_for
from tests.forked import called, environment
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


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (["run"], {"FAL_KEY": ""}, "FAL_KEY is not set"),
        (["run"], {"FAL_KEY": "no-colon-here"}, "key_id:secret"),
        (["run", "--start", "2026-11-31"], {}, "'2026-11-31' is not a date"),
        (["run", "--start", "2026-11-02", "--end", "2026-11-02"], {}, "--end is exclusive"),
        (["run", "--start", "2999-01-01"], {}, "--start 2999-01-01 is out of range"),
        (["run", "--resource", "invoices"], {}, "is none of usage"),
        (["run"], {"FALETL_API_URL": "http://192.0.2.1/v1"}, "plain http"),
        (["run"], {"FALETL_API_URL": "file:///etc/passwd"}, "https://"),
        (["run"], {"FALETL_WAREHOUSE": "mysql://x/y"}, "faletl keeps no warehouse in 'mysql'"),
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
    assert "so none is dropped; is FALETL_WAREHOUSE right?" in du.stdout
    assert faletl("landing", "prune", settings=lost).returncode == 2

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
    assert done.stdout == f"{out}: 2 windows written, 0 there already, 0 files out of date deleted\n"
    assert len(list(out.glob("usage/account=acme/day=2026-11-2?/*.parquet"))) == 2
    refused = faletl("grant", "--reader", "analysts", settings=readable)
    assert refused.returncode == 2
    assert "a DuckDB warehouse has no roles; give readers the published copy" in refused.stderr


def test_commands_on_nothing_say_so(tmp_path: Path) -> None:
    settings = settings_for("http://127.0.0.1:9", tmp_path)
    for command, told in (
        (["landing", "du"], "nothing has landed"),
        (["landing", "prune"], "0 reads, 0 bytes deleted"),
        (["rebuild"], "nothing was ever loaded"),
    ):
        done = faletl(*command, settings=settings)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    for command, told in (
        (["verify"], "faletl: nothing is loaded yet; run faletl run first\n"),
        (["rebuild", "--window", "2026-11-21"],
         "faletl: there is no warehouse yet; faletl rebuild makes all of it\n"),
    ):  # fmt: skip
        done = faletl(*command, settings=settings)
        assert done.returncode == 2
        assert done.stderr == told
    assert not (tmp_path / "warehouse.duckdb").exists()
