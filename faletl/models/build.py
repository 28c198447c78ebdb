"""Build the models and run their checks, in one transaction."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

import sqlalchemy as sa

from faletl import __version__
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import CheckFailedError, TamperedError, WarehouseError
from faletl.files import sql_folder
from faletl.models import seeds
from faletl.models.alerts import KEEP_OLD_RUNAWAYS, new_runaways
from faletl.models.catalogue import (
    LONGEST_SPAN,
    Check,
    Model,
    checks,
    column_comments,
    models,
    translate,
)
from faletl.models.days import is_by_day, lookups, restricted, sources, spans
from faletl.resources import RESOURCES
from faletl.warehouse import ownership
from faletl.warehouse.ledger import changed_days, fence
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import BUILDS, RAW, SCHEMA_VERSION, WAREHOUSE

log = logging.getLogger(__name__)

CHECKED_SPAN = 7
"""Maximum number of days whose rows one statement compares with each other."""


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build: the number of rebuilt days and of checks that passed.

    `runaways` is the number of new charges in reports.rpt_runaway_requests; `top_runaways` has a
    sentence for each of the most expensive ones, at most `MAX_NAMED_RUNAWAYS`.
    """

    build_id: str
    days: int
    checks: int
    runaways: int = 0
    top_runaways: tuple[str, ...] = ()


def needs_build(settings: Settings, connection: sa.Connection) -> bool:
    """Return whether raw, the SQL or the seeds changed since the last build."""
    last = _last_build(connection)
    loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    return last is None or last[:2] != (loaded, _models_digest(settings))


def has_unbuilt_rows(settings: Settings, connection: sa.Connection) -> bool:
    """Return whether a build is needed, or rows were quarantined since the last one.

    Quarantined rows alone are no reason to build, but reports would show them.
    """
    return needs_build(settings, connection) or bool(resources_changed(connection))


def resources_changed(connection: sa.Connection) -> Collection[str]:
    """Return the resources with rows that were loaded or quarantined since the last build."""
    last = _last_build(connection)
    since, token = (last[0], last[2]) if last else (0, 0)
    return changed_days(connection, since, token).keys()


def _last_build(connection: sa.Connection) -> tuple[int, str, int] | None:
    """Return raw version, digest of the models and fencing token of the newest build."""
    newest = (
        sa.select(BUILDS.c.data_version, BUILDS.c.models_digest, BUILDS.c.fencing_token)
        .order_by(BUILDS.c.fencing_token.desc())
        .limit(1)
    )
    row = connection.execute(newest).first()
    return (row.data_version, row.models_digest, row.fencing_token) if row else None


def make_next_build_full(connection: sa.Connection) -> None:
    """Make the next build a full one, because days changed without a load; inside a transaction."""
    newest = sa.select(sa.func.max(BUILDS.c.fencing_token)).scalar_subquery()
    connection.execute(
        sa.update(BUILDS).where(BUILDS.c.fencing_token == newest).values(models_digest="")
    )


def build_models(
    settings: Settings, warehouse: Warehouse, lease: Lease, *, run_id: str, full: bool = False
) -> Build:
    """Build what changed since the last build (`full`: everything) and check it; all or nothing.

    Raises:
        CheckFailedError: a check returned rows; nothing is changed.
        LeaseLostError: a newer run took over; nothing is changed.
        TamperedError: tables differ from those of the last build; only a full build replaces them.
        SettingsError: the table of units or owners cannot be read; or a foreign table or view has the
            name of one of ours.
    """
    started_at = datetime.now(UTC)
    connection = lease.connection
    rows = seeds.read(settings)
    is_full = True
    try:
        with lease.transaction():
            data_version = fence(lease, changes_data=False)
            last = _last_build(connection)
            is_full = full or last is None or last[1] != _models_digest(settings)
            since, token = (0, 0) if is_full or last is None else (last[0], last[2])
            changed = changed_days(connection, since, token)
            if last is not None:
                connection.exec_driver_sql(KEEP_OLD_RUNAWAYS)
            if is_full and last is not None:
                for sentence in seeds.changes(connection, rows):
                    log.warning("%s", sentence)
            if is_full:
                _create_all(connection, warehouse, rows)
            _fill_all(connection, warehouse, changed, is_full=is_full)
            passed = 0
            for check in checks():
                days = _days_of(check.sql, changed)
                if is_full or days:
                    passed += 1
                    _check(connection, check, warehouse.dialect, None if is_full else days)
            unmatched = seeds.unmatched(connection, settings) if is_full else []
            by_day = [days for name, days in changed.items() if RESOURCES[name].window == "day"]
            runaways, top = new_runaways(connection, started_at, is_first=last is None)
            build = Build(
                build_id=f"{started_at:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(3)}",
                days=len(set[date]().union(*by_day)),
                checks=passed,
                runaways=runaways,
                top_runaways=top,
            )
            connection.execute(
                sa.insert(BUILDS).values(
                    build_id=build.build_id,
                    run_id=run_id,
                    days=build.days,
                    checks=build.checks,
                    data_version=data_version,
                    fencing_token=lease.token,
                    models_digest=_models_digest(settings),
                    is_full=is_full,
                    started_at=started_at,
                    finished_at=datetime.now(UTC),
                )
            )
    except sa.exc.DBAPIError as error:
        raise _build_error(error, is_full=is_full) from None
    for sentence in unmatched:
        log.warning("%s", sentence)
    return build


def _build_error(error: sa.exc.DBAPIError, *, is_full: bool) -> WarehouseError | TamperedError:
    """Return the error for a build that the database refused."""
    refusal = f"the warehouse refused the build: {str(error.orig).splitlines()[0]}"
    if error.connection_invalidated:  # it is unknown whether the commit happened
        return WarehouseError(
            f"{refusal}; ops.builds shows whether it was committed, and the next run reads that"
        )
    if isinstance(error, sa.exc.ProgrammingError) and not is_full:
        return TamperedError(
            f"{refusal}; nothing was changed. If marts or reports were altered, faletl build --full "
            "builds them again"
        )
    return WarehouseError(f"{refusal}; nothing was changed")


def _days_of(sql: str, changed: Mapping[str, Collection[date]]) -> set[date]:
    """Return the changed days of all resources that the select reads."""
    return {day for resource in sources(sql) for day in changed.get(resource, ())}


def _create_all(
    connection: sa.Connection, warehouse: Warehouse, rows: Mapping[str, list[seeds.Row]]
) -> None:
    """Create functions, seeds, views and empty tables, before any table is filled."""
    ownership.claim(connection, [model.table for model in models()])
    warehouse.define_functions(connection)
    seeds.plant(connection, rows)
    for table in RAW.values():
        warehouse.analyze(connection, table.fullname)
    for model in models():
        _create(connection, warehouse, model)


def _create(connection: sa.Connection, warehouse: Warehouse, model: Model) -> None:
    """Create the model's view or its empty table, with all comments."""
    select = translate(f"select * from (\n{model.sql}\n) as model", warehouse.dialect)
    if model.is_view:
        warehouse.make_view(connection, model.table, select)
    else:
        warehouse.make_table(connection, model.table, select, model.day)
    kind = "view" if model.is_view else "table"
    comments = {f"{kind} {model.table}": model.comment}
    for name, text in column_comments()[model.table].items():
        comments[f'column {model.table}."{name}"'] = text
    connection.exec_driver_sql(
        "; ".join(f"comment on {on} is {quoted(text)}" for on, text in comments.items())
    )


def _fill_all(
    connection: sa.Connection,
    warehouse: Warehouse,
    changed: Mapping[str, Collection[date]],
    *,
    is_full: bool,
) -> None:
    """Fill every table (or those that changed) with the rows of its select, in build order."""
    looked_up = {table for model in models() for table in lookups(model)}
    rebuilt = set[str]()
    for model in models():
        days = _days_of(model.sql, changed)
        if model.is_view or not (days or is_full):
            continue
        if model.table in looked_up and not is_full:
            old_copy = _old_copy_of(model.table)
            connection.exec_driver_sql(
                f"create temporary table {old_copy} as select * from {model.table}"
            )
            rebuilt.add(model.table)
        has_own_days = is_by_day(model) or (
            not is_full and _lookups_unchanged(connection, lookups(model), rebuilt)
        )
        _fill(connection, model, warehouse.dialect, days if has_own_days else None)
        if is_full:  # the database has no statistics of it yet
            warehouse.analyze(connection, model.table)
    for table in rebuilt:
        connection.exec_driver_sql(f"drop table {_old_copy_of(table)}")


def _old_copy_of(table: str) -> str:
    """Return the name of the temporary table that keeps the rows from before this build."""
    return f"before_{table.replace('.', '_')}"


def _lookups_unchanged(
    connection: sa.Connection, looked_up: Mapping[str, frozenset[str] | None], rebuilt: Collection[str]
) -> bool:
    """Return whether the looked-up columns are unchanged after a rebuild; False without lookups."""
    for table in looked_up.keys() & rebuilt:
        columns, used = (
            connection.exec_driver_sql(f"select * from {table} limit 0").keys(),
            looked_up[table],
        )
        names = ", ".join(f'"{name}"' for name in columns if used is None or name in used)
        new, old = (f"select {names} from {source}" for source in (table, _old_copy_of(table)))
        difference = f"(({new}) except ({old})) union all (({old}) except ({new})) limit 1"
        if connection.exec_driver_sql(difference).first() is not None:
            return False
    return bool(looked_up)


def _fill(connection: sa.Connection, model: Model, dialect: str, days: Collection[date] | None) -> None:
    """Fill the table with the rows of its select: on those days, or (None) on all."""
    order = ""
    if model.grain and model.longest_span <= LONGEST_SPAN:
        # Such models sum up, so they have few rows. Without an order, each thread of DuckDB would keep
        # rows in memory until the commit, 256 KiB a column, for each statement.
        order = f"\norder by {', '.join(model.grain)}"
    if days is None:
        connection.exec_driver_sql(f"delete from {model.table}")
        select = translate(model.sql, dialect)
        connection.exec_driver_sql(f"insert into {model.table}\n{select}{order}")
        return
    for span in spans(days, model.longest_span):
        connection.exec_driver_sql(
            f"delete from {model.table} where {model.day} >= date '{span.first}' "
            f"and {model.day} < date '{span.end}'"
        )
        select = restricted(model.sql, span, dialect)
        connection.exec_driver_sql(f"insert into {model.table}\n{select}{order}")


def statements(
    connection: sa.Connection, check: Check, dialect: str, days: Collection[date] | None = None
) -> Iterator[str]:
    """Yield the selects of a check over those days, or all rows; keys are compared by a few days."""
    if days is None and check.keys_of and check.is_by_day:
        days = days_with_rows(connection, check.keys_of)
    if days is None or not check.is_by_day:
        yield translate(check.sql, dialect)
        return
    for span in spans(days, CHECKED_SPAN if check.keys_of else LONGEST_SPAN):
        yield restricted(check.sql, span, dialect)


def days_with_rows(connection: sa.Connection, model: Model) -> set[date]:
    """Return the days on which the table or view has rows."""
    days = f"select distinct {model.day} from {model.table} where {model.day} is not null"
    return set(connection.exec_driver_sql(days).scalars())


def _check(connection: sa.Connection, check: Check, dialect: str, days: Collection[date] | None) -> None:
    """Run a check over those days only, if it can be run by day (None: over all rows)."""
    for sql in statements(connection, check, dialect, days):
        rows = connection.exec_driver_sql(sql).mappings().fetchmany(3)
        if rows:
            shown = "; ".join(", ".join(f"{k} {v!a}" for k, v in row.items()) for row in rows)
            raise CheckFailedError(
                f"the check '{check.name}' found rows ({shown}); the build was undone and readers still "
                f"see the build before{'; ' * bool(check.cure)}{check.cure}",
                check=check.name,
            )


def _models_digest(settings: Settings) -> str:
    digest = hashlib.sha256(f"{__version__} {SCHEMA_VERSION}".encode())
    for path in sorted(sql_folder().rglob("*.*")):
        digest.update(path.read_bytes())
    for seed in (settings.units, settings.owners):
        digest.update(seed.read_bytes() if seed and seed.exists() else b"")
    digest.update(repr(sorted(settings.thresholds.items())).encode())
    return digest.hexdigest()
