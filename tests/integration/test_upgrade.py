"""A warehouse of an older faletl is brought up to date, without losing a row."""

from __future__ import annotations

import shutil
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import duckdb
import psycopg
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import SettingsError, TamperedError, UsageError
from faletl.invented import HEADER
from faletl.line.accounts import known_accounts
from faletl.operations.rebuild import rebuild
from faletl.operations.rename import rename
from faletl.operations.status import status
from faletl.operations.verify import verify
from faletl.sandbox import READONLY_KEY, Fault, Request, Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import METADATA, SCHEMA_VERSION
from tests import truth
from tests.conftest import all_tables, settings_for
from tests.forked import Trap, start

OLDER = Path(__file__).parents[1] / "older"

PRECISE = Decimal("0.123456789")
"""Seconds of video, to more digits than fal sends today."""

pytestmark = pytest.mark.duckdb_only("what is older is a DuckDB file; of PostgreSQL there is one test")


def served_then() -> truth.Account:
    """The account that those warehouses were made of.

    Where nothing was taken off, a charge said so with null, and some were no whole nano-dollars.
    """
    account = truth.two_days()
    account.lines = [
        replace(one, **truth.costs(PRECISE, one.unit_price, None), quantity=PRECISE)
        if one.endpoint_id == truth.VIDEO else one
        for one in account.lines
    ]  # fmt: skip
    of_line = {(one.hour, one.endpoint_id, one.quantity): one.cost_total for one in account.lines}
    account.events, before = [], Decimal(0)
    for one in truth.charges(account.lines):
        hour = one.timestamp.replace(minute=0, microsecond=0)
        cost = of_line[hour, one.endpoint_id, one.quantity] - before if one.quantity else one.cost_total
        before = cost
        account.events.append(
            replace(
                one,
                percent_discount=one.percent_discount or None,
                cost_subtotal=cost,
                cost_total=cost,
            )
        )
    return account


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A server of that account."""
    with Sandbox(served_then(), page_size=4) as server:
        yield server


@pytest.fixture(params=sorted(path.name for path in OLDER.iterdir()))
def older(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Settings:
    """A warehouse as an older faletl left it after a run over the served account, and its pages.

    Made with `export database … (format csv)`; marts and reports are left out, as they are made anew.
    """
    settings = settings_for(sandbox.url, tmp_path)
    kept = OLDER / request.param
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.execute((kept / "schema.sql").read_text("utf-8"))
        for path in sorted(kept.glob("*.csv")):
            table = path.stem.replace("_", ".", 1)
            connection.execute(f"copy {table} from '{path}' (format csv, header true)")
    with tarfile.open(kept / "landing.tar.gz") as landing:
        landing.extractall(tmp_path, filter="data")
    return settings


def raw_rows(settings: Settings, columns: dict[str, str] | None = None) -> dict[str, list[object]]:
    """All of raw and the ledger, or those columns of each table."""
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        return {
            name: sorted(connection.execute(f"select {names} from {name}").fetchall(), key=repr)
            for name, names in (columns or columns_of(settings)).items()
        }


def columns_of(settings: Settings) -> dict[str, str]:
    """The columns that raw and the ledger have now."""
    tables = [t.fullname for t in METADATA.tables.values() if t.schema == "raw"]
    with duckdb.connect(settings.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        return {
            name: ", ".join(f'"{row[0]}"' for row in connection.execute(f"describe {name}").fetchall())
            for name in (*tables, "ops.loads", "ops.horizons")
        }


def test_an_older_warehouse_is_upgraded_and_goes_on(
    older: Settings, sandbox: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    columns = columns_of(older)
    before = raw_rows(older)
    assert pipeline.build(older).build is not None
    assert raw_rows(older, columns) == before
    assert pipeline.publish(older).published
    assert verify(older).findings == []
    (tmp_path / "fresh").mkdir()
    fresh = settings_for(sandbox.url, tmp_path / "fresh")
    for settings in (older, fresh):
        assert pipeline.run(settings).exit_code == 0
    assert all_tables(older) == all_tables(fresh)
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///"), read_only=True) as connection:
        version = connection.execute("select schema_version from ops.warehouse").fetchone()
        bare = connection.execute(
            "select table_name, column_name from duckdb_columns() where comment is null "
            "and schema_name in ('raw', 'staging', 'marts', 'reports', 'ops')"
        )
        assert bare.fetchall() == []
    assert version == (SCHEMA_VERSION,)
    held = all_tables(older)
    rebuild(older)
    assert all_tables(older) == held


def test_an_older_warehouse_can_be_looked_at_first(
    older: Settings, clock: time_machine.Traveller
) -> None:
    windows = {line["resource"]: line["windows"] for line in status(older)["resources"]}
    assert windows["usage"] == 3
    assert verify(older).findings == []


@pytest.mark.parametrize("older", ["schema_3"], indirect=True)
def test_rows_of_an_older_digest_whose_pages_are_gone_are_not_called_changed(
    older: Settings, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    shutil.rmtree(next((tmp_path / "landing").glob("*/usage/2026-11-22")))
    findings = verify(older).findings
    assert any("2026-11-22" in f and "cannot be compared" in f for f in findings)
    assert not [finding for finding in findings if "its rows are not those of" in finding]


def test_a_killed_upgrade_leaves_the_older_warehouse(older: Settings) -> None:
    path = Path(older.warehouse.removeprefix("duckdb:///"))
    before = path.read_bytes()
    for kill in (
        Trap("faletl.warehouse.duckdb.copy_file"),  # a copy is there
        Trap("faletl.warehouse.schema.upgrade"),  # altered, not committed
        Trap("pathlib.Path.replace", "before"),  # committed, not in its place
    ):
        assert start(older, kill, command="build").finish()[0] == -signal.SIGKILL
        assert path.read_bytes() == before
    assert start(older, Trap("pathlib.Path.replace"), command="build").finish()[0] == -signal.SIGKILL
    with duckdb.connect(str(path), read_only=True) as connection:
        version = connection.execute("select schema_version from ops.warehouse").fetchone()
    assert version == (SCHEMA_VERSION,)
    assert start(older, command="build").finish()[0] == 0
    assert verify(older).findings == []
    assert not list(path.parent.glob(".*upgrade*"))


def accounts(settings: Settings) -> dict[str, tuple[tuple[str, ...], int, bool | None]]:
    """Per label the usernames, how many keys, and whether it is a sandbox's."""
    with open_warehouse(settings).reading() as connection:
        assert connection is not None
        known = known_accounts(connection)
    return {label: (a.usernames, len(a.key_ids), a.is_sandbox) for label, a in known.items()}


def test_accounts_of_an_older_warehouse_are_bound_by_the_next_good_run(
    older: Settings, sandbox: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    assert accounts(older) == {"acme": (("acme",), 0, None)}
    readonly = settings_for(sandbox.url, tmp_path, key=READONLY_KEY)
    assert pipeline.run(readonly).exit_code == 2
    assert accounts(older) == {"acme": (("acme",), 0, None)}
    assert pipeline.run(older).account == "acme"
    assert accounts(older) == {"acme": (("acme",), 1, True)}
    sandbox.fault = lambda r: Fault(status=403) if r.path == "/account/billing" else None
    assert pipeline.run(older).account == "acme"
    wrong = older.model_copy(update={"account": "prod"})
    [(_, error)] = pipeline.run(wrong).failures
    assert "faletl accounts rename 'acme' 'prod'" in str(error)


def test_an_account_of_an_older_warehouse_can_be_renamed_before_any_run(
    older: Settings, clock: time_machine.Traveller
) -> None:
    rename(older, "acme", "emea")
    assert accounts(older) == {"emea": (("acme",), 0, None)}
    assert verify(older).findings == []
    before = all_tables(older)
    rebuild(older)
    assert all_tables(older) == before
    assert pipeline.run(older).account == "emea"


def test_an_older_warehouse_of_fals_account_refuses_a_sandbox(
    older: Settings, sandbox: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    sandbox.fault = lambda _: Fault(headers={HEADER: ""})
    assert pipeline.run(older).exit_code == 0
    assert accounts(older) == {"acme": (("acme",), 1, False)}
    with Sandbox(truth.Account("sandbox"), keys={truth.OTHER_KEY: "FULL"}) as server:
        report = pipeline.run(settings_for(server.url, tmp_path, key=truth.OTHER_KEY))
    assert report.exit_code == 2
    assert "is a sandbox" in str(report.failures[0][1])


def test_a_username_that_an_older_faletl_loaded_twice_binds_neither_label_and_is_reported(
    older: Settings,
    sandbox: Sandbox,
    clock: time_machine.Traveller,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///")) as connection:
        for table, label in (("raw.credits", "_account"), ("ops.loads", "account")):
            only = "where resource = 'credits'" if table == "ops.loads" else ""
            connection.execute(
                f"insert into {table} select * replace ('prod' as {label}) from {table} {only}"
            )
    assert accounts(older) == {"acme": ((), 0, None), "prod": ((), 0, None)}
    sandbox.fault = lambda _: Fault(headers={HEADER: ""})
    named = older.model_copy(update={"account": "prod"})
    report = pipeline.extract(named, Asked(truth.day(22), truth.day(23), ["usage"]))
    assert (report.account, report.exit_code) == ("prod", 0)
    assert accounts(older) == {"acme": ((), 0, False), "prod": (("acme",), 1, False)}
    told = [one.getMessage() for one in caplog.records if "counts more than once" in one.getMessage()]
    assert len(told) == 1
    assert "faletl accounts forget" in told[0]


@pytest.mark.parametrize("username", [None, "acme-corp"])
def test_the_only_label_of_an_older_warehouse_is_taken_if_nothing_says_whose_it_is(
    username: str | None, older: Settings, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("delete from raw.credits")
        connection.execute("delete from ops.loads where resource = 'credits'")
    assert accounts(older) == {"acme": ((), 0, None)}

    def answer(request: Request) -> Fault:
        is_refused = request.path == "/account/billing" and username is None
        return Fault(status=403 if is_refused else None, headers={HEADER: ""})

    account = truth.two_days()
    account.account = username or "unsaid"
    with Sandbox(account, fault=answer) as server:
        settings = settings_for(server.url, tmp_path)
        assert pipeline.run(settings).account == "acme"
        assert accounts(older) == {"acme": ((username,) if username else (), 1, False)}


def test_a_postgresql_warehouse_of_schema_4_is_upgraded_and_goes_on(
    database: str, sandbox: Sandbox, clock: time_machine.Traveller, tmp_path: Path
) -> None:
    kept = OLDER / "schema_4"
    settings = settings_for(sandbox.url, tmp_path, warehouse=database)
    with psycopg.connect(database) as connection:
        connection.execute((kept / "postgres.sql").read_bytes())
        for path in sorted(kept.glob("*.csv")):
            table, content = path.stem.replace("_", ".", 1), path.read_text("utf-8")
            columns = content.partition("\n")[0]
            with connection.cursor().copy(
                f"copy {table} ({columns}) from stdin (format csv, header true)".encode()
            ) as copy:
                copy.write(content)
    with tarfile.open(kept / "landing.tar.gz") as landed:
        landed.extractall(tmp_path, filter="data")
    assert pipeline.build(settings).build is not None
    assert verify(settings).findings == []
    assert accounts(settings) == {"acme": (("acme",), 0, None)}
    (tmp_path / "fresh").mkdir()
    fresh = settings_for(sandbox.url, tmp_path / "fresh")
    for one in (settings, fresh):
        assert pipeline.run(one).exit_code == 0
    assert all_tables(settings) == all_tables(fresh)
    held = all_tables(settings)
    rebuild(settings)
    assert all_tables(settings) == held
    rename(settings, "acme", "emea")
    assert verify(settings).findings == []


def test_one_that_is_too_old_has_to_be_rebuilt(older: Settings, clock: time_machine.Traveller) -> None:
    with duckdb.connect(older.warehouse.removeprefix("duckdb:///")) as connection:
        connection.execute("update ops.warehouse set schema_version = 2")
    with pytest.raises(SettingsError, match="can upgrade from 3"):
        pipeline.build(older)
    shutil.rmtree(older.landing)  # as if this were another landing folder
    with pytest.raises(TamperedError, match="landed pages"):
        rebuild(older)


def test_what_a_newer_faletl_left_is_refused_and_stays_as_it_is(
    older: Settings, clock: time_machine.Traveller
) -> None:
    path = Path(older.warehouse.removeprefix("duckdb:///"))
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"update ops.warehouse set schema_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    for step in (pipeline.build, pipeline.publish, rebuild, verify, status):
        with pytest.raises(SettingsError, match=r"was written by a newer faletl .*; upgrade faletl"):
            step(older)
    assert path.read_bytes() == before
    assert not path.with_name("spend.duckdb").exists()

    for manifest in Path(older.landing).rglob("manifest.json"):
        manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 2'))
    path.unlink()
    with pytest.raises(UsageError, match=r"was landed by faletl .*; upgrade faletl"):
        rebuild(older)
    assert not path.exists()
