"""Models: run sql/ layer by layer, then its checks, in one transaction.

A model is one bare select in a file: its first comment line says what a row is for, its `grain` line
names the key, and a comment behind a column says what the column holds. A column that passes through
unchanged keeps the comment from where it was defined, in an earlier model or in the catalogue.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import sqlalchemy as sa
import sqlglot
from sqlglot import exp

from faletl import __version__
from faletl.config import Settings
from faletl.errors import CheckFailedError, SettingsError, WarehouseError
from faletl.load import fence
from faletl.warehouse import Lease, Warehouse
from faletl.warehouse.tables import BUILDS, RAW, SEED_UNIT, WAREHOUSE

log = logging.getLogger(__name__)

LAYERS = ("staging", "marts", "reports")
"""Folders of sql/ in build order; inside a folder the order of names (dim_ before fct_)."""

SOURCE_DIALECT = "duckdb"


@dataclass(frozen=True, slots=True)
class Model:
    """One select of sql/. `grain` is empty where rows need not be unique."""

    layer: str
    name: str
    sql: str
    comment: str
    grain: tuple[str, ...]

    @property
    def table(self) -> str:
        """Its table or view, with its schema."""
        return f"{self.layer}.{self.name}"


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build."""

    build_id: str
    days: int
    checks: int


def sql_folder() -> Path:
    """Where the SQL lies: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "sql"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "sql"


@cache
def models() -> tuple[Model, ...]:
    """Every model, in build order."""
    found = []
    for layer in LAYERS:
        for path in sorted((sql_folder() / layer).glob("*.sql")):
            sql = path.read_text("utf-8")
            comment, grain, *_ = (line.removeprefix("-- ") for line in sql.splitlines())
            keys = grain.removeprefix("grain: ").split(";")[0]
            key = () if keys == "none" else tuple(keys.split(", "))
            found.append(Model(layer, path.stem, sql, comment, key))
    return tuple(found)


@cache
def checks() -> dict[str, str]:
    """Every check by name: a select that must return no rows. Each grain is one of them."""
    written = {
        path.stem: path.read_text("utf-8") for path in sorted((sql_folder() / "checks").glob("*.sql"))
    }
    grains = {
        f"grain of {model.table}": (
            f"select {key}, count(*) as copies from {model.table} group by {key} having count(*) > 1"
        )
        for model in models()
        if (key := ", ".join(model.grain))
    }
    ledgers = {f"loads of {table.fullname}": _ledger_check(name, table) for name, table in RAW.items()}
    return written | grains | ledgers


def _ledger_check(resource: str, table: sa.Table) -> str:
    """What the ledger calls current stands in the raw table, row for row, and nothing else does."""
    cost = "sum(cost_total)" if "cost_total" in table.c else "0"
    return f"""
        with held as (
            select _account, _load_id, count(*) as held_rows, {cost} as held_cost
            from {table.fullname} group by _account, _load_id
        ),
        entered as (
            select account, load_id, rows as entered_rows, cost_total as entered_cost
            from ops.loads where resource = '{resource}' and is_current
        )
        select load_id, _load_id, held_rows, entered_rows, held_cost, entered_cost
        from held full join entered on _account = account and _load_id = load_id
        where coalesce(held_rows, 0) <> coalesce(entered_rows, 0)
            or coalesce(held_cost, 0) <> coalesce(entered_cost, 0)
    """


def translate(sql: str, dialect: str) -> str:
    """The same select in another database's SQL."""
    return sqlglot.transpile(sql, read=SOURCE_DIALECT, write=dialect, comments=False)[0]


@cache
def column_comments() -> dict[str, dict[str, str]]:
    """For each table and model the comment of each of its columns.

    A column without a comment of its own has that of the column of its name in the tables which the
    model reads, where these agree.

    Raises:
        ValueError: a column has no comment, or inherits more than one; a test keeps it from happening.
    """
    written = [*RAW.values(), SEED_UNIT]
    known = {t.fullname: {c.name: str(c.comment) for c in t.columns} for t in written}
    for model in models():
        select = sqlglot.parse_one(model.sql, read=SOURCE_DIALECT, into=exp.Select)
        read = [f"{table.db}.{table.name}" for table in select.find_all(exp.Table) if table.db]
        known[model.table] = {}
        for column in select.selects:
            own = " ".join(column.comments or []).strip()
            name = column.unalias().name or column.alias
            inherited = {known[table][name] for table in read if name in known[table]}
            if not own and len(inherited) != 1:
                raise ValueError(f"{model.table}.{column.alias_or_name}: {inherited or 'no comment'}")
            known[model.table][column.alias_or_name] = own or inherited.pop()
    return known


# --- Building -------------------------------------------------------------------------------------


def needs_build(settings: Settings, connection: sa.Connection) -> bool:
    """Whether raw, the SQL or the seeds changed since the last build."""
    newest = (
        sa.select(BUILDS.c.data_version, BUILDS.c.models_digest)
        .order_by(BUILDS.c.fencing_token.desc())
        .limit(1)
    )
    with connection.begin():
        last = connection.execute(newest).first()
        loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    return last is None or tuple(last) != (loaded, _models_digest(settings))


def build(settings: Settings, warehouse: Warehouse, lease: Lease, *, run_id: str) -> Build:
    """Build every model from raw and run every check; all or nothing.

    Raises:
        CheckFailedError: a check returned rows; nothing is changed.
        LeaseLostError: a newer run took over; nothing is changed.
        SettingsError: the unit table of FALETL_UNITS cannot be read.
    """
    started_at = datetime.now(UTC)
    connection = lease.connection
    units = _read_units(settings)
    try:
        with connection.begin():
            fence(lease, changes_data=False)
            connection.execute(sa.delete(SEED_UNIT))
            connection.execute(sa.insert(SEED_UNIT), units)
            for model in models():
                _build_model(connection, model, warehouse.dialect)
            _run_checks(connection, warehouse.dialect)
            usage_days = sa.text("select count(distinct usage_date) from marts.fct_usage")
            done = Build(
                build_id=f"{started_at:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(3)}",
                days=connection.execute(usage_days).scalar_one(),
                checks=len(checks()),
            )
            connection.execute(
                sa.insert(BUILDS).values(
                    build_id=done.build_id,
                    run_id=run_id,
                    days=done.days,
                    checks=done.checks,
                    data_version=sa.select(WAREHOUSE.c.data_version).scalar_subquery(),
                    fencing_token=lease.token,
                    models_digest=_models_digest(settings),
                    started_at=started_at,
                    finished_at=datetime.now(UTC),
                )
            )
    except sa.exc.DBAPIError as error:
        raise WarehouseError(
            f"the warehouse refused the build: {str(error.orig).splitlines()[0]}; nothing was changed"
        ) from None
    return done


def _build_model(connection: sa.Connection, model: Model, dialect: str) -> None:
    kind = "view" if model.layer == "staging" else "table"
    select = translate(model.sql, dialect)
    connection.exec_driver_sql(f"create or replace {kind} {model.table} as {select}")
    _comment(connection, f"{kind} {model.table}", model.comment)
    for name, text in column_comments()[model.table].items():
        _comment(connection, f'column {model.table}."{name}"', text)


def _comment(connection: sa.Connection, on: str, text: str) -> None:
    quoted = text.replace("'", "''")
    connection.exec_driver_sql(f"comment on {on} is '{quoted}'")


def _run_checks(connection: sa.Connection, dialect: str) -> None:
    for name, sql in checks().items():
        found = connection.exec_driver_sql(translate(sql, dialect)).mappings().fetchmany(3)
        if found:
            told = "; ".join(", ".join(f"{k} {v!a}" for k, v in row.items()) for row in found)
            raise CheckFailedError(
                f"the check '{name}' found rows ({told}); the build was undone and readers keep what "
                "they had",
                check=name,
            )


def _read_units(settings: Settings) -> list[dict[str, object]]:
    """The unit table: ours, and the rows of FALETL_UNITS instead of or beside it."""
    units: dict[str, dict[str, object]] = {}
    for path in filter(None, (sql_folder() / "seeds" / "unit.csv", settings.units)):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    unit = row["unit"].strip().lower()
                    units[unit] = {
                        "unit": unit,
                        "canonical_unit": row["canonical_unit"],
                        "family": row["family"],
                        "base_unit": row["base_unit"] or None,
                        "factor": row["factor"] or None,
                    }
        except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
            raise SettingsError(
                f"FALETL_UNITS: {path} is no unit table with the columns unit, canonical_unit, family, "
                f"base_unit, factor ({error})"
            ) from None
    return list(units.values())


def _models_digest(settings: Settings) -> str:
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(sql_folder().rglob("*.*")):
        digest.update(path.read_bytes())
    digest.update(settings.units.read_bytes() if settings.units and settings.units.exists() else b"")
    return digest.hexdigest()
