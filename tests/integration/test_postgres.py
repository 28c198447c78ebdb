"""A PostgreSQL warehouse: the rows of DuckDB's, one writer, readers that never see half of a run."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import duckdb
import psycopg
import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.cli.output import Format, print_query
from faletl.config import Settings
from faletl.errors import (
    LeaseLostError,
    SettingsError,
    TamperedError,
    UsageError,
    WarehouseBusyError,
    WarehouseError,
)
from faletl.line import replace
from faletl.models import catalogue
from faletl.models.alerts import new_runaways
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import fence
from faletl.warehouse.tables import METADATA, SCHEMA_VERSION
from tests import truth
from tests.conftest import all_tables, ask, needs_root, published_path, settings_for, total
from tests.forked import Trap, fork, start
from tests.integration.test_disk import MIB, SmallDisk, check, check_runs, failed
from tests.integration.test_kills import check_a_clean_run_mends_all, is_killed, loaded
from tests.servers import Postgres, free_ports, pooled, shared_postgres, wait_for
from tests.truth import FLUX, VIDEO, Account, line

ODD_IDS = (
    "%s 100%% \\N",
    "a\"b'c,d;--",
    "new\nline\ttab\r",
    "é ÿ \u202e 🙂 ﬀ",
    "Robert'); drop table raw.usage;--",
    ":name {x} $1 $$",
    " ",
    "B",
    "a",
    "Z",
    "ä",
)
"""Endpoint ids, though fal has none like these."""


DAY = Asked(truth.day(21), truth.day(22), ["usage"])
SPENT = "select sum(cost_total) from reports.rpt_spend_daily"


@pytest.fixture
def on_server(sandbox: Sandbox, tmp_path: Path, database: str) -> Settings:
    """Settings for the served account and a PostgreSQL warehouse."""
    return settings_for(sandbox.url, tmp_path, warehouse=database)


@pytest.fixture
def on_file(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings for the same account and a DuckDB warehouse."""
    warehouse = f"duckdb:///{tmp_path / 'warehouse.duckdb'}"
    landing = str(tmp_path / "landing-of-file")
    return settings_for(sandbox.url, tmp_path, warehouse=warehouse, landing=landing)


def types(settings: Settings) -> list[tuple[Any, ...]]:
    """The columns of all tables and views, in order, with one name for what is one type."""
    names = {
        "text": "VARCHAR", "numeric": "DECIMAL(38,12)", "bigint": "BIGINT", "integer": "INTEGER",
        "boolean": "BOOLEAN", "date": "DATE", "timestamp without time zone": "TIMESTAMP",
        "timestamp with time zone": "TIMESTAMP WITH TIME ZONE",
    }  # fmt: skip
    columns = ask(
        settings,
        "select table_schema, table_name, ordinal_position, column_name, data_type "
        "from information_schema.columns "
        "where table_schema in ('raw', 'staging', 'marts', 'reports', 'ops') order by 1, 2, 3",
    )
    return [(*column, names.get(kind, kind)) for *column, kind in columns]


def comments(database: str) -> dict[str, str]:
    """What stands beside each column of a server."""
    with psycopg.connect(database) as connection:
        found = connection.execute(
            "select attrelid::regclass || '.' || attname, col_description(attrelid, attnum) "
            "from pg_attribute where attnum > 0 and not attisdropped and attrelid in "
            "(select oid from pg_class where relkind in ('r', 'v') and relnamespace::regnamespace::text "
            "in ('raw', 'staging', 'marts', 'reports', 'ops'))"
        )
        return dict(found.fetchall())


def test_both_warehouses_hold_the_same_rows_through_a_history(
    clock: time_machine.Traveller,
    account: Account,
    sandbox: Sandbox,
    on_server: Settings,
    on_file: Settings,
) -> None:
    noon = datetime.fromisoformat("2026-11-22T12:00:00+00:00")
    account.lines += [
        line(noon, endpoint, f"{number + 1}.0000007", "0.00003")
        for number, endpoint in enumerate(ODD_IDS)
    ]
    account.listed |= {id_: {**account.listed[FLUX], "endpoint_id": id_} for id_ in ODD_IDS[:4]}

    def check_both(step: Any) -> None:
        for settings in (on_file, on_server):
            step(settings)
        assert all_tables(on_server) == all_tables(on_file)
        assert types(on_server) == types(on_file)

    def run(settings: Settings) -> None:
        report = pipeline.run(settings)
        assert report.exit_code == 0, report.failures

    check_both(run)
    check_both(run)  # the same once more
    account.lines.append(line(noon, VIDEO, "8", "0.4", unit="second"))  # late
    account.lines[15] = line(account.lines[15].hour, FLUX, "30", "0.025")  # restated
    del account.lines[16]  # taken back
    account.listed[FLUX] = {**account.listed[FLUX], "unit_price": 0.03}
    clock.shift(timedelta(days=1))
    check_both(run)
    clock.shift(timedelta(days=8))  # over the end of the month
    check_both(run)
    check_both(lambda settings: pipeline.build(settings, full=True))
    check_both(rebuild)
    check_both(lambda settings: rebuild(settings, truth.day(22)))
    restatements = "select * exclude (load_id, seen_at) from ops.restatements order by all"
    changed = ask(on_file, restatements)
    assert len(changed) > 2
    with psycopg.connect(on_server.warehouse) as connection:
        count = connection.execute("select count(*) from ops.restatements").fetchone()
    assert count == (len(changed),)
    assert total(on_server) == sum(one.cost_total for one in account.lines)
    moved = on_file.model_copy(update={"warehouse": shared_postgres().new_database("moved")})
    rebuild(moved)  # a warehouse moves to a server with its landed pages alone
    assert all_tables(moved) == all_tables(on_file)
    for settings in (on_file, on_server, moved):
        assert verify(settings).findings == []
    assert all(comments(on_server.warehouse).values())


def test_quotients_are_exact_in_both_and_rounded_alike(database: str) -> None:
    values = [
        "0", "1", "-1", "3", "7", "0.000000000001", "0.000000000003", "12345678901234.567890123456",
        "99999999999999.999999999999", "-2.5", "0.3",
    ]  # fmt: skip
    with duckdb.connect() as file, psycopg.connect(database) as server:
        from faletl.warehouse.duckdb import MACROS
        from faletl.warehouse.postgres import FUNCTIONS

        for macro in MACROS:
            file.execute(macro)
        for function in FUNCTIONS:
            server.execute(function)

        def both(call: str) -> Decimal | None:
            ours = server.execute(f"select cast({call} as decimal(38,12))").fetchone()
            theirs = file.execute(f"select cast({call} as decimal(38,12))").fetchone()
            assert ours == theirs, call
            found: Decimal | None = ours[0] if ours else None
            return found

        for a in values:
            for b in values[1:]:
                cast_a, cast_b = f"{a}::decimal(38,12)", f"{b}::decimal(38,12)"
                if abs(Decimal(a) / Decimal(b)) < 10**20:
                    both(f"quotient({cast_a}, {cast_b})")
                    if Decimal(b) > 0 and abs(Decimal(a)) < 10**8:
                        both(f"proportion({cast_a}, {cast_a}, {cast_b})")
        assert both("quotient(2::decimal(38,12), 3::decimal(38,12))") == Decimal("0.666666666667")
        assert both("quotient(1::decimal(38,12), 0::decimal(38,12))") is None


# --- One writer -----------------------------------------------------------------------------------


def hold(settings: Settings) -> None:
    """Take the lease, and keep it."""
    with open_warehouse(settings).lease("another"):
        print("held", flush=True)
        time.sleep(600)


def test_a_writer_waits_then_says_who_holds_it_and_a_killed_one_lets_go(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    impatient = on_server.model_copy(update={"lock_seconds": 0.3})
    with open_warehouse(on_server).lease("a long load"):
        with pytest.raises(WarehouseBusyError, match=r"a long load \(process .* since 2026-11-23"):
            open_warehouse(impatient).lease("me").__enter__()
        assert total(on_server) > 0  # readers do not wait
    held = fork(hold, on_server)
    wait_for("another holds it", lambda: held.said.read_text("utf-8"), seconds=60, every=0.05)
    with pytest.raises(WarehouseBusyError):
        open_warehouse(impatient).lease("me").__enter__()
    held.send(signal.SIGKILL)
    held.finish()
    patient = on_server.model_copy(update={"lock_seconds": 30})
    with open_warehouse(patient).lease("me"):
        pass


def test_a_holder_that_was_taken_over_writes_nothing(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    with open_warehouse(on_server).lease("the old one") as lease:
        with psycopg.connect(on_server.warehouse) as newer:
            newer.execute("update ops.warehouse set fencing_token = fencing_token + 1, holder = 'newer'")
        with pytest.raises(LeaseLostError, match="newer"), lease.transaction():
            fence(lease, changes_data=True)


def test_a_load_and_a_build_that_are_killed_at_any_step_are_done_or_not(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    days = Asked(truth.day(21), truth.day(23), ["usage"])
    assert pipeline.extract(on_server, days).exit_code == 0
    for kill in (
        Trap("faletl.warehouse.postgres.PostgresWarehouse.load_rows"),
        Trap("faletl.line.replace._record_load"),  # all written, not committed
    ):
        assert is_killed(start(on_server, kill, command="load"))
        assert loaded(on_server) == (0, 0)
    # Committed, not told.
    assert is_killed(start(on_server, Trap("faletl.line.load.replace_window"), command="load"))
    assert loaded(on_server) == (15, 1)
    assert start(on_server, command="load").finish()[0] == 0
    assert loaded(on_server) == (30, 2)
    assert is_killed(start(on_server, Trap("faletl.models.build._fill", nth=9), command="build"))
    assert builds(on_server) == 0
    # Built, not noted as published.
    assert is_killed(start(on_server, Trap("faletl.line.release.build_models"), command="build"))
    assert builds(on_server) == 1
    check_a_clean_run_mends_all(on_server)


def builds(settings: Settings) -> int:
    """How many are committed."""
    return int(ask(settings, "select count(*) from ops.builds")[0][0])


def test_a_killed_rebuild_leaves_the_old_rows(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server, Asked(truth.day(21), truth.day(23), ["usage"]))
    before, spent = all_tables(on_server), ask(on_server, SPENT)
    for kill in (
        Trap("faletl.operations.rebuild.replay", nth=2),
        Trap("faletl.operations.rebuild.build_models"),
    ):
        assert is_killed(start(on_server, kill, command="rebuild"))
        assert ask(on_server, SPENT) == spent
        assert loaded(on_server) == (30, 2)
    assert start(on_server, command="rebuild").finish()[0] == 0
    assert all_tables(on_server) == before


def test_a_killed_upgrade_leaves_the_older_schema(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server, Asked(truth.day(21), truth.day(22), ["usage"]))
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("update ops.warehouse set schema_version = 3")
        owner.execute("alter table raw.models drop column license_type cascade")
    lacks = (
        "select schema_version, (select count(*) from information_schema.columns where "
        "table_schema = 'raw' and table_name = 'models' and column_name = 'license_type') "
        "from ops.warehouse"
    )
    assert is_killed(start(on_server, Trap("faletl.warehouse.schema.upgrade"), command="build"))
    assert ask(on_server, lacks) == [(3, 0)]
    assert start(on_server, command="build --full").finish()[0] == 0
    assert ask(on_server, lacks) == [(SCHEMA_VERSION, 1)]


def test_a_signal_ends_a_wait_for_the_lock(clock: time_machine.Traveller, on_server: Settings) -> None:
    waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with open_warehouse(on_server).lease("a test"):
        waiting = start(on_server, command="build --full")
        wait_for("it waits", lambda: ask(on_server, waits) == [(1,)], seconds=60, every=0.05)
        waiting.send(signal.SIGTERM)
        assert waiting.finish(30)[0] == 143


# --- Readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["on_file", "on_server"])
def test_a_reader_never_fails_and_never_sees_half_of_a_run(
    kind: str, clock: time_machine.Traveller, account: Account, request: pytest.FixtureRequest
) -> None:
    settings: Settings = request.getfixturevalue(kind)
    pipeline.run(settings)
    where = settings.warehouse if kind == "on_server" else str(published_path(settings))
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.reading_on", where],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for hour in range(3):
        account.lines.append(line(truth.NOW - timedelta(days=1, hours=hour), VIDEO, "2"))
        clock.shift(timedelta(hours=5))
        assert pipeline.run(settings, Asked(start=truth.day(22))).exit_code == 0
    pipeline.build(settings, full=True)
    pipeline.publish(settings)
    rebuild(settings)
    told, _ = reader.communicate("enough", timeout=60)
    rounds, wrong = json.loads(told)
    assert rounds > 3
    assert wrong == []
    assert total(settings) == sum(one.cost_total for one in account.lines)


def of_role(settings: Settings, role: str, *rights: str) -> Settings:
    """The same settings for a role that is no superuser, with these rights."""
    with psycopg.connect(settings.warehouse, autocommit=True) as owner:
        owner.execute(f"drop role if exists {role}")
        owner.execute(f"create role {role} login nosuperuser nocreatedb nocreaterole")
        for right in rights:
            owner.execute(f"grant {right} to {role}")
    warehouse = settings.warehouse.replace("//faletl@", f"//{role}@")
    return settings.model_copy(update={"warehouse": warehouse})


def test_a_query_has_no_powers_over_the_server(
    clock: time_machine.Traveller, on_server: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(on_server)
    file_reader = of_role(on_server, "file_reader", "pg_read_server_files")
    for mighty in (on_server, file_reader):
        for form in get_args(Format):
            with pytest.raises(UsageError, match="may read files of the server, or more"):
                print_query(mighty, "select pg_read_file('/etc/passwd')", form)
    asker = of_role(on_server, "asker")
    open_warehouse(on_server).grant("asker")
    capsys.readouterr()
    print_query(asker, "select count(*) > 0 as has_rows from reports.rpt_spend_daily", "csv")
    assert capsys.readouterr().out == "has_rows\nTrue\n"
    with pytest.raises(UsageError, match="permission denied"):
        print_query(asker, "select count(*) from raw.usage", "csv")


def test_a_query_of_a_reader_can_change_nothing(
    clock: time_machine.Traveller, on_server: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    on_server = of_role(
        on_server, "asking_loader", "create on database " + on_server.warehouse.rpartition("/")[2]
    )
    with pytest.raises(UsageError, match="nothing is published yet"):
        print_query(on_server, "select 1", "csv")
    pipeline.run(on_server)
    before = all_tables(on_server)
    for query in (
        "drop table raw.usage",
        "delete from raw.usage returning 1",
        "with gone as (delete from raw.usage returning *) select * from gone",
        "select 1; delete from raw.usage",
        "select 1; commit; delete from raw.usage",
        "commit",
        "set session characteristics as transaction read write",
    ):
        with pytest.raises(UsageError, match="the query was refused"):
            print_query(on_server, query, "csv")
    assert all_tables(on_server) == before
    capsys.readouterr()
    print_query(on_server, "select 'a%b' as a, null as b, quotient(2, 3) as c, true as d", "csv")
    assert capsys.readouterr().out == "a,b,c,d\na%b,,0.666666666667,True\n"


def test_an_export_has_the_types_of_the_query(
    clock: time_machine.Traveller, on_server: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    warehouse = open_warehouse(on_server)
    assert not warehouse.export_query("select 1", path)
    pipeline.run(on_server)
    query = "select usage_date, unit, sum(cost_total) as cost, count(*) as lines, null as none, "
    query += "'\\N' as text from reports.rpt_spend_daily group by 1, 2 order by 1, 2"
    assert warehouse.export_query(query, path)
    found = duckdb.sql(f"from '{path}'")
    assert list(map(str, found.types)) == [
        "DATE", "VARCHAR", "DECIMAL(38,12)", "BIGINT", "VARCHAR", "VARCHAR",
    ]  # fmt: skip
    assert found.fetchall() == ask(on_server, query)
    assert warehouse.export_query("select null as only where 1 = 1", path)
    assert duckdb.sql(f"from '{path}'").fetchall() == [(None,)]


# --- Roles and databases --------------------------------------------------------------------------


def as_role(database: str, role: str) -> psycopg.Connection[Any]:
    """A connection of somebody else."""
    return psycopg.connect(database, user=role, autocommit=True)


def test_a_reader_gets_marts_and_reports_and_nothing_else(
    clock: time_machine.Traveller, account: Account, on_server: Settings
) -> None:
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        for role in ("analysts", 'odd "role" 100%'):
            quoted = psycopg.sql.Identifier(role).as_string()
            owner.execute(f"drop role if exists {quoted}")
            owner.execute(f"create role {quoted} login")
    warehouse = open_warehouse(on_server)
    with pytest.raises(UsageError, match="nothing is loaded yet"):
        warehouse.grant("analysts")
    pipeline.run(on_server)
    with pytest.raises(UsageError, match="there is no role 'nobody'"):
        warehouse.grant("nobody")
    with as_role(on_server.warehouse, "analysts") as reader:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute("select * from reports.rpt_spend_daily")
        warehouse.grant("analysts")
        warehouse.grant('odd "role" 100%')
        with psycopg.connect(on_server.warehouse) as owner:  # as if its shape had changed
            owner.execute("drop table marts.dim_unit")
        pipeline.build(on_server, full=True)
        for model in catalogue.models():
            if model.layer in ("marts", "reports"):
                reader.execute(f"select * from {model.table}")
        for refused in (
            "select * from raw.usage", "select * from staging.stg_fal__usage",
            "select * from staging.int_usage_daily", "select * from ops.loads",
            "select * from ops.warehouse", "insert into marts.dim_unit values ('x')",
            "update reports.rpt_spend_daily set cost_total = 0", "delete from marts.fct_usage",
            "truncate marts.fct_usage", "drop table marts.fct_usage", "create table marts.mine (a int)",
            "create table raw.mine (a int)", "create table public.mine (a int)", "create schema mine",
            "alter table marts.dim_unit add column a int", "alter role analysts superuser",
            "grant select on raw.usage to analysts", "set role faletl", "create extension file_fdw",
            "copy marts.dim_unit to '/tmp/stolen'", "copy (select 1) to program 'touch /tmp/stolen'",
            "create temp table t (a text); copy t from '/etc/passwd'", "select lo_import('/etc/passwd')",
            "select pg_read_file('/etc/passwd')", "select pg_ls_dir('/etc')",
            "select * from pg_authid", "alter system set archive_command = 'id'",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute(refused)


def test_the_loader_needs_no_superuser(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path, database: str
) -> None:
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute("drop role if exists loader")
        owner.execute("create role loader login nosuperuser nocreatedb nocreaterole")
    loader = database.replace("//faletl@", "//loader@")
    settings = settings_for(sandbox.url, tmp_path, warehouse=loader)
    report = pipeline.run(settings)
    assert report.exit_code == 2
    assert "in which its role may create schemas" in str(report.failures[-1][1])
    with psycopg.connect(database, autocommit=True) as owner:
        for name in ("raw", "staging", "marts", "reports", "ops"):  # or: grant create on database
            owner.execute(f"create schema {name} authorization loader")
    assert pipeline.run(settings).exit_code == 0
    rebuild(settings)
    assert verify(settings).findings == []


EVERY_OBJECT = """
    select nspname, relname, pg_class.oid
    from pg_class join pg_namespace on pg_namespace.oid = relnamespace
    where nspname !~ '^(pg_|information_schema)' order by 1, 2
"""

THEIRS = {
    "create table raw.models (mine int)": ["raw.models"],
    "create table marts.dim_date (holiday text)": ["marts.dim_date"],
    "create view staging.stg_fal__models as select 1 as mine": ["staging.stg_fal__models"],
    "create table ops.loads (mine int); create view reports.rpt_spend_daily as select 1 as mine": [
        "ops.loads", "reports.rpt_spend_daily",
    ],
    "create function staging.quotient(numeric, numeric) returns numeric language sql return 1": [
        "staging.quotient"
    ],
    "create domain reports.rpt_spend_daily as text; create type raw.usage as enum ('a')": [
        "raw.usage", "reports.rpt_spend_daily",
    ],
}  # fmt: skip


@pytest.mark.parametrize("made", THEIRS)
def test_a_database_of_somebody_else_is_left_alone(
    made: str, clock: time_machine.Traveller, on_server: Settings
) -> None:
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        for name in ("raw", "staging", "marts", "reports", "ops"):
            owner.execute(f"create schema {name}")
            owner.execute(f"comment on schema {name} is 'theirs'")
        owner.execute(made.encode())
        before = owner.execute(EVERY_OBJECT).fetchall()
        for _ in range(2):  # the first try is no reason to take them for ours
            report = pipeline.run(on_server)
            assert report.exit_code == 2
            told = str(report.failures[-1][1])
            assert f"names that faletl needs: {', '.join(THEIRS[made])};" in told
        assert owner.execute(EVERY_OBJECT).fetchall() == before
        comments = (
            "select distinct obj_description(oid) from pg_namespace where nspname in ('raw', 'marts')"
        )
        assert owner.execute(comments).fetchall() == [("theirs",)]


def test_schemas_of_somebody_else_are_shared_where_no_name_is_the_same(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    theirs = "create schema marts; create table marts.dim_customer (name text); create schema staging"
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        owner.execute(theirs)
        owner.execute("insert into marts.dim_customer values ('theirs')")
        assert pipeline.run(on_server).exit_code == 0
        rebuild(on_server)
        assert owner.execute("select name from marts.dim_customer").fetchall() == [("theirs",)]


def test_what_a_later_version_would_make_is_not_taken_from_somebody_else(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        # As if dim_unit were a table that only this version makes.
        owner.execute("delete from ops.objects where name = 'marts.dim_unit'")
        owner.execute("drop table marts.dim_unit; create table marts.dim_unit (mine text)")
        with pytest.raises(SettingsError, match=r"faletl needs: marts\.dim_unit;"):
            pipeline.build(on_server, full=True)
        owner.execute("select mine from marts.dim_unit")


def test_views_of_users_keep_a_table_that_would_get_another_shape(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("create view public.units as select unit from marts.dim_unit")
        owner.execute("create view public.mine as select unit from public.units")
        owner.execute("create view public.rows as select * from staging.stg_fal__usage")
    pipeline.build(on_server, full=True)  # the same shape is no hindrance
    assert ask(on_server, "select count(*) > 0 from public.rows") == [(True,)]
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("alter table marts.dim_unit add column more int")
    named = (
        r"marts\.dim_unit gets other columns, but foreign views read it: public\.mine, public\.units;"
    )
    with pytest.raises(SettingsError, match=named):
        pipeline.build(on_server, full=True)
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("drop view public.units cascade")
    pipeline.build(on_server, full=True)
    assert ask(on_server, "select count(*) from marts.dim_unit")[0][0] > 0


@pytest.mark.parametrize(
    "made",
    [
        "create table public.kept (id int, unit marts.dim_unit)",
        """
        create function public.units() returns setof marts.dim_unit language sql
        begin atomic select * from marts.dim_unit; end
        """,
        "create materialized view public.kept as select * from marts.dim_unit",
    ],
)
def test_whatever_depends_on_a_table_keeps_it_from_getting_another_shape(
    made: str, clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        owner.execute(made.encode())
        owner.execute("alter table marts.dim_unit add column more int")
        before = owner.execute(EVERY_OBJECT).fetchall()
        with pytest.raises(SettingsError, match=r"marts\.dim_unit gets other columns, but .*public\."):
            pipeline.build(on_server, full=True)
        assert owner.execute(EVERY_OBJECT).fetchall() == before


def test_a_grant_lets_nobody_read_what_others_keep_in_the_same_schema(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        for role in ("analysts", "stranger"):
            owner.execute(f"drop role if exists {role}")
            owner.execute(f"create role {role} login")
        owner.execute("create schema marts; create table marts.salaries (amount int)")
        owner.execute("create table marts.foreign_owned (a int)")
        owner.execute("alter table marts.foreign_owned owner to stranger")
        assert pipeline.run(on_server).exit_code == 0
        owner.execute("alter default privileges in schema marts grant select on tables to analysts")
        open_warehouse(on_server).grant("analysts")
        owner.execute("create table marts.bonus (amount int)")
        with as_role(on_server.warehouse, "analysts") as reader:
            reader.execute("select * from marts.dim_unit")
            for refused in ("salaries", "bonus", "foreign_owned"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    reader.execute(f"select * from marts.{refused}")
        owner.execute("drop owned by stranger; drop owned by analysts")


def test_a_reader_in_an_open_transaction_keeps_no_build_waiting(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    hasty = on_server.model_copy(update={"lock_seconds": 2.0})
    with psycopg.connect(on_server.warehouse) as reader:
        reader.execute("select count(*) from reports.rpt_freshness, staging.stg_fal__usage")
        pipeline.build(hasty, full=True)
        rebuild(hasty)
        assert verify(hasty).findings == []


@pytest.mark.parametrize(
    "lost",
    [
        "drop table ops.warehouse",
        "alter schema raw rename to raw_old",
        "alter schema staging rename to staging_old",
        "drop schema ops cascade",
    ],
)
def test_a_rebuild_makes_a_schema_that_is_gone(
    lost: str, clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    before = all_tables(on_server)
    objects = ask(on_server, "select count(*), count(distinct name) from ops.objects")
    with psycopg.connect(on_server.warehouse, autocommit=True) as owner:
        owner.execute(lost.encode())
    if "ops" in lost:  # nothing tells a run what is loaded
        ((_, refused),) = pipeline.run(on_server).failures
        assert "marts.dim_account" in str(refused)
        assert "faletl rebuild" in str(refused)
    rebuild(on_server)
    assert all_tables(on_server) == before
    assert verify(on_server).findings == []
    assert ask(on_server, "select count(*), count(distinct name) from ops.objects") == objects


def test_a_newer_warehouse_is_refused_and_one_that_lacks_columns_is_upgraded(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server)
    before = all_tables(on_server)
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("update ops.warehouse set schema_version = 99")
    with pytest.raises(SettingsError, match="written by a newer faletl"):
        pipeline.build(on_server)
    with psycopg.connect(on_server.warehouse) as owner:
        owner.execute("update ops.warehouse set schema_version = 3")
        owner.execute("alter table ops.warehouse drop column faletl_version")
        owner.execute("alter table raw.models drop column license_type cascade")
        owner.execute("drop table ops.validations")
        owner.execute("comment on table raw.usage is 'old'")
    pipeline.build(on_server, full=True)
    after = all_tables(on_server)
    lacking = ("raw.models", "staging.stg_fal__models")
    for name, rows in before.items():
        assert after[name] == rows or (name in lacking and len(after[name]) == len(rows))
    assert all(comments(on_server.warehouse).values())
    with psycopg.connect(on_server.warehouse) as owner:
        told = owner.execute("select obj_description('raw.usage'::regclass)").fetchone()
    assert told == (METADATA.tables["raw.usage"].comment,)


@pytest.mark.parametrize(
    ("url", "exit_code", "says"),
    [
        ("postgresql://faletl:hunter2-hunter2@127.0.0.1:1/w", 1, "cannot be reached"),
        ("postgresql://faletl:hunter2-hunter2@{server}/nowhere", 2, "does not exist"),
        ("postgresql://nobody:hunter2-hunter2@{server}/postgres", 2, "does not exist"),
        ("postgresql://faletl:hunter2-hunter2@{server}", 2, "name the database"),
        ("postgresql://faletl:hunter2-hunter2@{server}/postgres?no_such_option=1", 1, "option"),
        ("mysql://faletl:hunter2-hunter2@{server}/w", 2, "does not support 'mysql'"),
        ("postgresql:/faletl:hunter2-hunter2", 2, "not an SQLAlchemy URL"),
    ],
)
def test_no_password_is_told_when_a_server_cannot_be_used(
    url: str, exit_code: int, says: str, database: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    server = sa.make_url(database)
    url = url.format(server=f"{server.host}:{server.port}")
    settings = settings_for(sandbox.url, tmp_path, warehouse=url)
    with pytest.raises((SettingsError, WarehouseError), match=says) as caught:
        pipeline.build(settings)
    assert caught.value.exit_code == exit_code
    assert "hunter2" not in repr(settings) + str(caught.value) + str(caught.value.as_dict())


# --- What a server may do -------------------------------------------------------------------------


def test_settings_of_a_database_change_nothing(
    clock: time_machine.Traveller, account: Account, on_server: Settings
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(on_server.warehouse)["dbname"]
    for setting in (
        "datestyle = 'German'", "standard_conforming_strings = off", "quote_all_identifiers = on",
        "idle_in_transaction_session_timeout = 60000", "client_encoding = 'LATIN1'",
        "intervalstyle = 'iso_8601'", "extra_float_digits = 0", "bytea_output = 'escape'",
    ):  # fmt: skip
        in_another_session(on_server, f"alter database {name} set {setting}")
    assert pipeline.run(on_server).exit_code == 0
    assert total(on_server) == sum(one.cost_total for one in account.lines)
    assert verify(on_server).findings == []
    rebuild(on_server)
    assert verify(on_server).findings == []
    with open_warehouse(on_server).lease("a test") as lease:  # whose transactions take their time
        timeout = "show idle_in_transaction_session_timeout"
        assert lease.connection.exec_driver_sql(timeout).scalar() == "0"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused(
    encoding: str, on_server: Settings, database: str
) -> None:
    name = f"narrow_{encoding.lower()}"
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute(f"drop database if exists {name}")
        owner.execute(f"create database {name} encoding '{encoding}' locale 'C' template template0")
    url = sa.make_url(on_server.warehouse).set(database=name)
    narrow = on_server.model_copy(update={"warehouse": url.render_as_string(hide_password=False)})
    report = pipeline.run(narrow)
    assert report.exit_code == 2
    assert f"has the encoding {encoding}" in str(report.failures[-1][1])


def in_another_session(settings: Settings, *statements: str) -> None:
    """Each for itself, whatever the defaults of the database."""
    writing = "-c default_transaction_read_only=off"
    with psycopg.connect(settings.warehouse, autocommit=True, options=writing) as other:
        for statement in statements:
            other.execute(statement)


def own_session(settings: Settings) -> int:
    """The process that serves the loader."""
    found = ask(
        settings,
        "select pid from pg_stat_activity where application_name like 'faletl%' "
        "and datname = current_database()",
    )
    return int(found[0][0])


class Befalling:
    """Things that happen to the session of a load before a function is called for the first time."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._server = settings, shared_postgres()
        self.ends: Callable[[], object] = lambda: None

    def kill_backend(self) -> None:
        """All others are ended by it, too, and the server recovers."""
        os.kill(own_session(self._settings), signal.SIGKILL)
        self._server.wait()

    def terminate(self) -> None:
        """What an administrator does."""
        in_another_session(self._settings, f"select pg_terminate_backend({own_session(self._settings)})")

    def kill_postmaster(self) -> None:
        """The machine may have run out of memory."""
        self._server.crash(signal.SIGKILL)

    def stop_immediately(self) -> None:
        """The server, without waiting for anybody."""
        self._server.crash(signal.SIGQUIT)

    def change_the_row(self) -> None:
        """That the transaction has seen already, and is about to change."""
        in_another_session(self._settings, TOUCH)

    def lock(self) -> None:
        """The table that is to be written."""
        holder = psycopg.connect(self._settings.warehouse)
        holder.execute("lock table raw.usage in share row exclusive mode")
        self.ends = holder.close

    def lock_crosswise(self) -> None:
        """First what the load is about to want, then what it has."""
        holder = psycopg.connect(self._settings.warehouse)
        holder.execute("set deadlock_timeout = '60s'")  # the other one is to notice
        holder.execute("lock table raw.usage in share row exclusive mode")
        crossing = Thread(target=holder.execute, args=(TOUCH,))
        crossing.start()
        waits = "select count(*) from pg_locks where not granted"
        wait_for("it waits", lambda: ask(self._settings, waits) == [(1,)], seconds=60, every=0.05)

        def end() -> None:
            crossing.join()
            holder.close()

        self.ends = end


TOUCH = "update ops.warehouse set held_since = held_since"
LOST = "connection is lost|server closed the connection|terminating connection"


@pytest.mark.parametrize(
    ("function", "befalls", "setting", "said"),
    [
        ("_insert", "kill_backend", "", LOST),
        ("_insert", "terminate", "", LOST),
        ("_insert", "kill_postmaster", "", LOST),
        ("_insert", "stop_immediately", "", LOST),
        ("_delete_window", "lock", "statement_timeout = 1500", "due to statement timeout"),
        ("_delete_window", "lock_crosswise", "deadlock_timeout = 100", "deadlock detected"),
        ("fence", "change_the_row", "default_transaction_isolation = serializable", "not serialize"),
        ("_insert", "", "default_transaction_read_only = on", "in a read-only transaction"),
    ],
)
def test_whatever_ends_a_transaction_is_said_and_undone_and_the_next_run_is_right(
    function: str, befalls: str, setting: str, said: str,
    clock: time_machine.Traveller, account: Account, on_server: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipeline.run(on_server, DAY)
    before = ask(on_server, SPENT), loaded(on_server)
    account.lines[0] = line(account.lines[0].hour, FLUX, "9")
    name = psycopg.conninfo.conninfo_to_dict(on_server.warehouse)["dbname"]
    if setting:
        in_another_session(on_server, f"alter database {name} set {setting}")
    befalling, original = Befalling(on_server), getattr(replace, function)
    happens = [getattr(befalling, befalls)] if befalls else []

    def first(*given: Any, **named: Any) -> Any:
        if happens:
            happens.pop()()
        return original(*given, **named)

    monkeypatch.setattr(replace, function, first)
    ((_, failure),) = pipeline.run(on_server, DAY).failures
    befalling.ends()
    assert not happens
    assert isinstance(failure, WarehouseError)
    assert failure.is_retryable
    assert re.search(said, str(failure)), failure
    assert (ask(on_server, SPENT), loaded(on_server)) == before
    if setting:
        in_another_session(on_server, f"alter database {name} reset all")
    assert pipeline.run(on_server, DAY).exit_code == 0
    assert total(on_server) == sum(one.cost_total for one in account.lines if one.hour.day == 21)
    assert loaded(on_server) == (15, 2)


def test_a_server_that_cannot_answer_now_is_asked_again_later(on_server: Settings) -> None:
    in_another_session(
        on_server, "drop role if exists crowd", "create role crowd login connection limit 0"
    )
    crowded = on_server.model_copy(
        update={"warehouse": on_server.warehouse.replace("//faletl@", "//crowd@")}
    )
    with pytest.raises(WarehouseError, match=r"cannot be reached: .*too many connections"):
        pipeline.build(crowded)
    with open_warehouse(on_server).lease("a test"):
        pass
    name = psycopg.conninfo.conninfo_to_dict(on_server.warehouse)["dbname"]
    in_another_session(on_server, f"alter database {name} set statement_timeout = 300")
    with psycopg.connect(on_server.warehouse) as other:
        other.execute("lock table ops.warehouse")  # nobody can even tell whether it is ours
        with pytest.raises(WarehouseError, match="statement timeout"):
            pipeline.build(on_server)


class Swallowing:
    """A way to a server on which the answer to the next COMMIT is lost, when it is told to lose it."""

    def __init__(self, to: int) -> None:
        self.is_armed = False
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            ours, _ = self._listener.accept()
            theirs = socket.create_connection(("127.0.0.1", self._to))
            Thread(target=self._pass_on, args=(ours, theirs), daemon=True).start()

    def _pass_on(self, ours: socket.socket, theirs: socket.socket) -> None:
        with ours, theirs:
            while True:
                for ready in select.select([ours, theirs], [], [])[0]:
                    sent = ready.recv(2**16)
                    if not sent:
                        return
                    (theirs if ready is ours else ours).sendall(sent)
                    if self.is_armed and ready is ours and b"COMMIT" in sent:
                        self.is_armed = False
                        theirs.recv(2**16)  # it has committed
                        return


def test_where_the_answer_to_a_commit_is_lost_the_ledger_tells_whether_it_was_made(
    clock: time_machine.Traveller, account: Account, on_server: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    way = Swallowing(to=shared_postgres().port)
    far = on_server.model_copy(
        update={"warehouse": on_server.warehouse.replace(str(shared_postgres().port), str(way.port))}
    )
    pipeline.run(far, DAY)
    account.lines[0] = line(account.lines[0].hour, FLUX, "9")
    enter, tell = replace._record_load, new_runaways

    def entered(*given: Any) -> None:
        enter(*given)
        way.is_armed = True

    def told(*given: Any, **named: Any) -> Any:
        way.is_armed = True
        return tell(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(replace, "_record_load", entered)
        ((_, lost),) = pipeline.run(far, DAY).failures
    assert isinstance(lost, WarehouseError)
    assert "the ledger shows whether the window is loaded" in str(lost)
    assert loaded(on_server) == (15, 2)  # it was made
    with monkeypatch.context() as patch:
        patch.setattr("faletl.models.build.new_runaways", told)
        report = pipeline.run(far, DAY)
    ((_, lost),) = report.failures
    assert [outcome.outcome for outcome in report.outcomes] == ["unchanged"]
    assert "ops.builds shows whether it was committed" in str(lost)
    assert builds(on_server) == 2
    report = pipeline.run(far, DAY)
    assert (report.exit_code, report.build) == (0, None)
    assert report.published
    assert loaded(on_server) == (15, 2)
    assert total(on_server) == sum(one.cost_total for one in account.lines if one.hour.day == 21)


def on_a_server_with_a_full_disk(folder: Path, url: str) -> None:
    """A tablespace on a small disk, which is full when rows are to be written, and grows."""
    disk = SmallDisk(folder / "disk", f"size={48 * MIB}")
    server = Postgres(folder / "server", free_ports(1)[0], role="faletl")
    shutil.chown(disk.folder, server.user)
    with server.running(), time_machine.travel(truth.NOW, tick=True):
        plain = psycopg.connect(host="127.0.0.1", port=server.port, user="faletl", autocommit=True)
        plain.execute(f"create tablespace small location '{disk.folder}'")
        plain.execute("create database small tablespace small")
        plain.close()
        warehouse = f"postgresql://faletl@127.0.0.1:{server.port}/small"
        settings = settings_for(url, folder, warehouse=warehouse)
        for function in ("faletl.line.replace._insert", "faletl.models.build._fill"):
            Trap(function, "before", springs=disk.fill)()
            (failure,) = failed(settings)
            assert isinstance(failure, WarehouseError)
            assert "No space left on device" in str(failure)
            disk.grow()
        check_runs(settings)


@needs_root
def test_a_server_whose_disk_is_full_is_said_and_spoils_nothing(sandbox: Sandbox) -> None:
    folder = Path(tempfile.mkdtemp(prefix="faletl-postgres-"))
    folder.chmod(0o755)  # the server runs as somebody else
    check(fork(on_a_server_with_a_full_disk, folder, sandbox.url))
    shutil.rmtree(folder)


def test_tables_that_somebody_altered_are_told_and_made_anew(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    pipeline.run(on_server, DAY)
    before = all_tables(on_server)
    for statement, said in (
        ("alter table raw.usage drop column cost_discount cascade", "cost_discount is gone"),
        ("alter table ops.restatements alter quantity_after type real", "is of type real"),
    ):
        in_another_session(on_server, statement)
        assert said in verify(on_server).findings[0]
        with pytest.raises(TamperedError, match=f"{said}.*faletl rebuild"):
            pipeline.build(on_server)
        rebuild(on_server)
    assert all_tables(on_server) == before
    in_another_session(on_server, "alter table marts.fct_usage alter quantity type double precision")
    (found,) = verify(on_server).findings
    assert "marts.fct_usage: the column quantity is of type double precision" in found
    in_another_session(on_server, "alter table marts.fct_usage drop column quantity")
    (found,) = verify(on_server).findings
    assert "marts.fct_usage has other columns than its SQL" in found
    pipeline.build(on_server, full=True)
    assert all_tables(on_server) == before


# --- Behind a pooler ------------------------------------------------------------------------------


def reached_by(address: str, settings: Settings) -> Settings:
    """Settings for the same database, by way of the pooler that listens there."""
    url = sa.make_url(settings.warehouse)
    host, port = address.split(":")
    behind = url.set(host=host, port=int(port)).render_as_string(hide_password=False)
    return settings.model_copy(update={"warehouse": behind})


def test_a_pool_in_session_mode_is_as_good_as_the_server(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    # A session that the pool takes back must hold no lock, though nothing else clears it.
    with pooled(shared_postgres(), pool_mode="session", server_reset_query="") as address:
        settings = reached_by(address, on_server)
        assert pipeline.run(settings).exit_code == 0
        rebuild(settings)
        assert verify(settings).findings == []
        impatient = on_server.model_copy(update={"lock_seconds": 0.3})
        with (
            open_warehouse(settings).lease("a long load"),
            pytest.raises(WarehouseBusyError, match="a long load"),
        ):
            open_warehouse(impatient).lease("me").__enter__()
        with open_warehouse(impatient).lease("me"):
            pass
    assert total(on_server) > 0


def test_a_holder_that_is_killed_behind_a_pool_leaves_no_lock(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    with pooled(shared_postgres(), pool_mode="session") as address:
        settings = reached_by(address, on_server)
        with open_warehouse(settings).lease("the first"):
            pass
        held = fork(hold, settings)
        wait_for("another holds it", lambda: held.said.read_text("utf-8"), seconds=60, every=0.05)
        held.send(signal.SIGKILL)
        held.finish()
        patient = on_server.model_copy(update={"lock_seconds": 30})
        with open_warehouse(patient).lease("me"):
            pass


@pytest.mark.parametrize("one_after_the_other", [0, 1])
@pytest.mark.parametrize("connections", [1, 20])
def test_a_pool_that_shares_sessions_is_refused_before_anything_is_written(
    connections: int, one_after_the_other: int, clock: time_machine.Traveller, on_server: Settings
) -> None:
    settings = {"default_pool_size": connections, "server_round_robin": one_after_the_other}
    with (
        psycopg.connect(on_server.warehouse, autocommit=True) as owner,
        pooled(shared_postgres(), pool_mode="transaction", **settings) as address,
    ):
        before = owner.execute(EVERY_OBJECT).fetchall()
        shared = reached_by(address, on_server)
        with_idle_sessions(shared.warehouse, connections)
        for open_it in (open_warehouse(shared).published, open_warehouse(shared).reading):
            with pytest.raises(SettingsError, match="pool_mode = session"):
                open_it().__enter__()
        report = pipeline.run(shared)
        assert report.exit_code == 2
        assert "pool_mode = session" in str(report.failures[-1][1])
        assert owner.execute(EVERY_OBJECT).fetchall() == before
        with psycopg.connect(shared.warehouse, autocommit=True) as next_one:
            assert next_one.execute("show search_path").fetchall() == [('"$user", public',)]


def with_idle_sessions(url: str, many: int) -> None:
    """Let the pool open sessions of the server, which are idle afterwards."""
    with ExitStack() as stack:
        for _ in range(min(many, 4)):
            stack.enter_context(psycopg.connect(url)).execute("select 1")


def test_a_pool_of_single_statements_is_refused(
    clock: time_machine.Traveller, on_server: Settings
) -> None:
    with pooled(shared_postgres(), pool_mode="statement") as address:
        report = pipeline.run(reached_by(address, on_server))
        assert report.exit_code == 2, report.failures
        assert "statement pooling" in str(report.failures[-1][1])
