"""Shared fixtures: a served account, settings that point at it, a clock that tests move."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import hypothesis
import psycopg
import pytest
import sqlglot
import time_machine

from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox
from tests import truth
from tests.servers import shared_postgres

Query = Callable[..., list[tuple[Any, ...]]]

# No test fails because the machine is busy.
hypothesis.settings.register_profile("unhurried", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in Settings.model_fields:
        monkeypatch.delenv(str(Settings.model_fields[name].validation_alias), raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    """The clock stands still at `truth.NOW` until a test moves it."""
    with time_machine.travel(truth.NOW, tick=False) as traveller:
        yield traveller


@pytest.fixture
def account() -> truth.Account:
    """A small account with two days of usage."""
    return truth.two_days()


@pytest.fixture
def sandbox(account: truth.Account) -> Iterator[Sandbox]:
    """The account, served over HTTP in small pages."""
    with Sandbox(account, page_size=4) as server:
        yield server


@pytest.fixture
def settings(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of a run against the served account."""
    return settings_for(sandbox.url, tmp_path)


@pytest.fixture
def database() -> str:
    """The URL of an empty database on a private PostgreSQL server."""
    return shared_postgres().new_database(f"test_{secrets.token_hex(6)}")


@pytest.fixture(autouse=True)
def _drop_databases() -> Iterator[None]:
    """What a test made on the server is gone after it."""
    yield
    _DATABASES.clear()
    if shared_postgres.cache_info().currsize:
        shared_postgres().drop_databases()


@pytest.fixture
def query(settings: Settings) -> Query:
    """Ask the published copy, as a reader would."""
    return lambda sql: ask(settings, sql)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk of its own")

IS_ON_POSTGRES = os.environ.get("TEST_WAREHOUSE") == "postgres"
"""Whether the tests look at a PostgreSQL warehouse where nothing else is said: make test-postgres."""

_DATABASES: dict[Path, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a server, leave out what is about DuckDB's file."""
    for item in items if IS_ON_POSTGRES else ():
        if mark := item.get_closest_marker("duckdb_only"):
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


def settings_for(url: str, folder: Path, **given: object) -> Settings:
    """Settings for a warehouse of its own for `folder`; without the gate, unless `given` says so.

    The gate is looked at by its own tests, and by those of the command line and the documents.
    """
    return Settings.isolated(
        **{
            "key": FULL_KEY,
            "api_url": url,
            "warehouse": warehouse_for(folder),
            "landing": str(folder / "landing"),
            "first_days": 2,
            "rate": 0,
            "gate": False,
            **given,
        }
    )


def warehouse_for(folder: Path) -> str:
    """FALETL_WAREHOUSE: always the same for the same folder."""
    if not IS_ON_POSTGRES:
        return f"duckdb:///{folder / 'warehouse.duckdb'}"
    if folder not in _DATABASES:
        _DATABASES[folder] = shared_postgres().new_database(f"test_{secrets.token_hex(6)}")
    return _DATABASES[folder]


def published_path(settings: Settings) -> Path:
    """The file that readers open."""
    return Path(settings.warehouse.removeprefix("duckdb:///")).with_name("spend.duckdb")


@contextmanager
def opened(settings: Settings) -> Iterator[Any]:
    """The warehouse itself, for somebody who edits it by hand."""
    if settings.warehouse.startswith("postgresql:"):
        connected: Any = psycopg.connect(settings.warehouse)
    else:
        connected = duckdb.connect(settings.warehouse.removeprefix("duckdb:///"))
    with connected as connection:
        connection.execute("set TimeZone = 'UTC'")
        yield connection


@contextmanager
def published(settings: Settings) -> Iterator[Any]:
    """A reader of the published copy, or of the server: a connection that executes SQL."""
    if settings.warehouse.startswith("postgresql:"):
        connected: Any = psycopg.connect(settings.warehouse, autocommit=True)
    else:
        connected = duckdb.connect(str(published_path(settings)), read_only=True)
    with connected as connection:
        connection.execute("set TimeZone = 'UTC'")
        yield connection


def ask(
    settings: Settings,
    sql: str,
    through: Callable[[Settings], AbstractContextManager[Any]] = published,
) -> list[tuple[Any, ...]]:
    """Rows of the published copy, or of the server; instants in the one UTC that Python has."""
    with through(settings) as connection:
        return _rows(connection, sql)


def _rows(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    is_sorted, sql = sql.endswith("order by all"), sql.removesuffix("order by all")
    if isinstance(connection, psycopg.Connection):
        sql = sqlglot.transpile(sql, "duckdb", "postgres")[0]
    found = connection.execute(sql).fetchall()
    rows = [tuple(_plain(value) for value in row) for row in found]
    return sorted(rows, key=_nulls_last) if is_sorted else rows


def _nulls_last(row: tuple[Any, ...]) -> list[tuple[bool, Any]]:
    return [(value is None, 0 if value is None else value) for value in row]


def _plain(value: Any) -> Any:
    has_zone = isinstance(value, datetime) and value.tzinfo is not None
    return value.astimezone(UTC) if has_zone else value


def all_tables(settings: Settings) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of all layers that two warehouses of the same data must share.

    Where a row was landed differs with the cut into pages and with each load; so do the ledgers, and
    what rpt_freshness says of them. Tables have the names that they have without a prefix.
    """
    columns: dict[str, list[str]] = {}
    prefix = settings.schema_prefix
    schemas = ", ".join(f"'{prefix}{name}'" for name in ("raw", "staging", "marts", "reports"))
    with published(settings) as connection:
        for table, column in _rows(
            connection,
            f"select substr(table_schema, {len(prefix) + 1}) || '.' || table_name, column_name "
            "from information_schema.columns "
            f"where table_schema in ({schemas}) order by 1, ordinal_position",
        ):
            is_shared = table != "reports.rpt_freshness"
            if is_shared and column not in ("_load_id", "_page", "_row", "load_id"):
                columns.setdefault(table, []).append(f'"{column}"')
        return {
            table: sorted(_rows(connection, f"select {', '.join(names)} from {prefix}{table}"), key=repr)
            for table, names in columns.items()
        }


def total(settings: Settings) -> Decimal:
    """All that is published as spent."""
    return Decimal(
        ask(settings, "select coalesce(sum(cost_total), 0) from reports.rpt_spend_daily")[0][0]
    )
