"""FALETL_SCHEMA_PREFIX: a warehouse in a database with schemas of others, and with another warehouse."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import time_machine

from faletl import pipeline
from faletl.cli.output import print_query
from faletl.config import Settings
from faletl.errors import SettingsError, WarehouseBusyError
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from tests.conftest import all_tables, ask, settings_for
from tests.servers import shared_postgres
from tests.truth import FLUX, Account, line

OURS = ["raw", "staging", "marts", "reports", "ops"]


@pytest.fixture(params=["on_file", "on_server"])
def plain(request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings without a prefix, for each kind of warehouse."""
    file = f"duckdb:///{tmp_path / 'warehouse.duckdb'}"
    warehouse = file if request.param == "on_file" else request.getfixturevalue("database")
    return settings_for(sandbox.url, tmp_path, warehouse=warehouse)


@pytest.fixture
def prefixed(plain: Settings, tmp_path: Path) -> Settings:
    """Settings with a prefix: in another file, or in the same database."""
    changed: dict[str, Any] = {"schema_prefix": "fal_", "landing": str(tmp_path / "landing-of-fal")}
    if plain.warehouse.startswith("duckdb"):
        changed["warehouse"] = f"duckdb:///{tmp_path / 'of-fal' / 'warehouse.duckdb'}"
    return plain.model_copy(update=changed)


def schemas(settings: Settings) -> set[str]:
    """The schemas that have tables or views in the warehouse."""
    found = ask(settings, "select distinct table_schema from information_schema.tables")
    return {name for (name,) in found if name not in ("pg_catalog", "information_schema")}


def test_a_prefix_changes_the_names_of_schemas_and_nothing_else(
    clock: time_machine.Traveller,
    account: Account,
    plain: Settings,
    prefixed: Settings,
) -> None:
    def check_both(step: Any) -> None:
        for settings in (plain, prefixed):
            step(settings)
        assert all_tables(prefixed) == all_tables(plain)

    def run(settings: Settings) -> None:
        assert pipeline.run(settings).exit_code == 0

    check_both(run)
    account.lines[15] = line(account.lines[15].hour, FLUX, "30", "0.025")  # restated
    clock.shift(timedelta(days=1))
    check_both(run)
    check_both(rebuild)
    assert verify(prefixed).findings == []
    both = {*OURS, *(f"fal_{name}" for name in OURS)}
    assert schemas(prefixed) == (
        both if prefixed.warehouse == plain.warehouse else {f"fal_{name}" for name in OURS}
    )
    made = {name for (name,) in ask(prefixed, "select name from fal_ops.objects")}
    assert {"fal_marts.dim_date", "fal_reports.rpt_spend_daily"} <= made
    assert all(name.startswith("fal_") for name in made)


def test_two_warehouses_of_a_database_do_not_wait_for_each_other(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path, database: str
) -> None:
    ours, theirs = (
        settings_for(sandbox.url, tmp_path, warehouse=database, schema_prefix=prefix, lock_seconds=0.2)
        for prefix in ("a_", "b_")
    )
    with (
        open_warehouse(ours).lease("one"),
        open_warehouse(theirs).lease("another"),
        pytest.raises(WarehouseBusyError, match="in use by one"),
    ):
        open_warehouse(ours).lease("a third").__enter__()


def test_readers_of_a_prefix_read_its_marts_and_reports(
    clock: time_machine.Traveller,
    sandbox: Sandbox,
    tmp_path: Path,
    database: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_for(sandbox.url, tmp_path, warehouse=database, schema_prefix="fal_")
    pipeline.run(settings)
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute("drop role if exists reader_of_prefix; create role reader_of_prefix login")
    open_warehouse(settings).grant("reader_of_prefix")
    server = shared_postgres()
    url = database.replace(f"{server.role}@", "reader_of_prefix@")
    reader = settings.model_copy(update={"warehouse": url})
    capsys.readouterr()
    print_query(reader, "select count(*) as days from fal_reports.rpt_spend_daily", "json")
    (found,) = json.loads(capsys.readouterr().out)
    assert found["days"] > 0
    with closing(psycopg.connect(url)) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("select * from fal_ops.loads")


def test_a_file_is_not_opened_with_another_prefix(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    file = tmp_path / "warehouse.duckdb"
    settings = settings_for(sandbox.url, tmp_path, warehouse=f"duckdb:///{file}")
    assert pipeline.run(settings, Asked(resources=["credits"])).exit_code == 0
    before = file.read_bytes()
    other = settings.model_copy(update={"schema_prefix": "fal_"})
    _, error = pipeline.run(other).failures[-1]
    assert "fal_ (FALETL_SCHEMA_PREFIX)" in str(error)
    with pytest.raises(SettingsError, match=r"fal_ \(FALETL_SCHEMA_PREFIX\)"):
        rebuild(other)
    assert file.read_bytes() == before
