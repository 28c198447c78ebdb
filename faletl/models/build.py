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
from faletl.models.alerts import REMEMBER_RUNAWAYS, new_runaways
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
"""Days of which a statement compares all rows with each other."""


@dataclass(frozen=True, slots=True)
class Build:
    """A finished build: how many days were made anew, how many checks found nothing.

    `runaways` is how many charges are in reports.rpt_runaway_requests that were not before it, and
    `dearest_runaways` has a sentence for each of the dearest of them, at most `TELL_RUNAWAYS`.
    """

    build_id: str
    days: int
    checks: int
    runaways: int = 0
    dearest_runaways: tuple[str, ...] = ()


def needs_build(settings: Settings, connection: sa.Connection) -> bool:
    """Whether raw, the SQL or the seeds changed since the last build."""
    last = _last_build(connection)
    loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    return last is None or last[:2] != (loaded, _models_digest(settings))


def has_unbuilt_rows(settings: Settings, connection: sa.Connection) -> bool:
    """Whether it needs a build, or rows were set aside since: no reason to build, but a difference."""
    return needs_build(settings, connection) or bool(resources_changed(connection))


def resources_changed(connection: sa.Connection) -> Collection[str]:
    """The resources of which something was loaded, or set aside, since the last build."""
    last = _last_build(connection)
    since, token = (last[0], last[2]) if last else (0, 0)
    return changed_days(connection, since, token).keys()


def _last_build(connection: sa.Connection) -> tuple[int, str, int] | None:
    """What the newest build stands on: version of the raw tables, digest of the models, its token."""
    newest = (
        sa.select(BUILDS.c.data_version, BUILDS.c.models_digest, BUILDS.c.fencing_token)
        .order_by(BUILDS.c.fencing_token.desc())
        .limit(1)
    )
    found = connection.execute(newest).first()
    return (found.data_version, found.models_digest, found.fencing_token) if found else None


def make_next_build_full(connection: sa.Connection) -> None:
    """Inside a transaction: days changed that no load names, so the next build makes all of them."""
    newest = sa.select(sa.func.max(BUILDS.c.fencing_token)).scalar_subquery()
    connection.execute(
        sa.update(BUILDS).where(BUILDS.c.fencing_token == newest).values(models_digest="")
    )


def build_models(
    settings: Settings, warehouse: Warehouse, lease: Lease, *, run_id: str, full: bool = False
) -> Build:
    """Build what changed since the last build (`full`: everything), then check it; all or nothing.

    Raises:
        CheckFailedError: a check returned rows; nothing is changed.
        LeaseLostError: a newer run took over; nothing is changed.
        TamperedError: tables are not those of the last build, and only a full one makes them anew.
        SettingsError: the table of units or of owners cannot be read; or somebody else's table or view
            has the name of one of ours.
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
                connection.exec_driver_sql(REMEMBER_RUNAWAYS)
            if is_full and last is not None:
                for sentence in seeds.changes(connection, rows):
                    log.warning("%s", sentence)
            if is_full:
                _make_room(connection, warehouse, rows)
            _fill_all(connection, warehouse, changed, is_full=is_full)
            checked = 0
            for check in checks():
                days = _days_of(check.sql, changed)
                if is_full or days:
                    checked += 1
                    _check(connection, check, warehouse.dialect, None if is_full else days)
            unmatched = seeds.unmatched(connection, settings) if is_full else []
            by_day = [days for name, days in changed.items() if RESOURCES[name].window == "day"]
            runaways, dearest = new_runaways(connection, started_at, is_first=last is None)
            done = Build(
                build_id=f"{started_at:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(3)}",
                days=len(set[date]().union(*by_day)),
                checks=checked,
                runaways=runaways,
                dearest_runaways=dearest,
            )
            connection.execute(
                sa.insert(BUILDS).values(
                    build_id=done.build_id,
                    run_id=run_id,
                    days=done.days,
                    checks=done.checks,
                    data_version=data_version,
                    fencing_token=lease.token,
                    models_digest=_models_digest(settings),
                    is_full=is_full,
                    started_at=started_at,
                    finished_at=datetime.now(UTC),
                )
            )
    except sa.exc.DBAPIError as error:
        raise _refused(error, is_full=is_full) from None
    for sentence in unmatched:
        log.warning("%s", sentence)
    return done


def _refused(error: sa.exc.DBAPIError, *, is_full: bool) -> WarehouseError | TamperedError:
    """The error for a build that the database ended."""
    told = f"the warehouse refused the build: {str(error.orig).splitlines()[0]}"
    if error.connection_invalidated:  # before or after it had committed, who knows
        return WarehouseError(f"{told}; whether it is built is in ops.builds, which the next run reads")
    if isinstance(error, sa.exc.ProgrammingError) and not is_full:
        return TamperedError(
            f"{told}; nothing was changed. Did somebody alter marts or reports? faletl build --full "
            "makes them anew"
        )
    return WarehouseError(f"{told}; nothing was changed")


def _days_of(sql: str, changed: Mapping[str, Collection[date]]) -> set[date]:
    """The days that changed in what the select reads."""
    return {day for resource in sources(sql) for day in changed.get(resource, ())}


def _make_room(
    connection: sa.Connection, warehouse: Warehouse, rows: Mapping[str, list[seeds.Row]]
) -> None:
    """Make all that models stand on, and their views and empty tables."""
    ownership.claim(connection, [model.table for model in models()])
    warehouse.define_functions(connection)
    seeds.plant(connection, rows)
    for table in RAW.values():
        warehouse.analyze(connection, table.fullname)
    for model in models():
        _create(connection, warehouse, model)


def _create(connection: sa.Connection, warehouse: Warehouse, model: Model) -> None:
    """Make the model's view, or its empty table, with all comments."""
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
    """Make every table hold what its select gives, or those that changed, in build order."""
    looked_up = {table for model in models() for table in lookups(model)}
    renewed = set[str]()
    for model in models():
        days = _days_of(model.sql, changed)
        if model.is_view or not (days or is_full):
            continue
        if model.table in looked_up and not is_full:
            before = _before(model.table)
            connection.exec_driver_sql(f"create temporary table {before} as select * from {model.table}")
            renewed.add(model.table)
        has_own_days = is_by_day(model) or (
            not is_full and _says_the_same(connection, lookups(model), renewed)
        )
        _fill(connection, model, warehouse.dialect, days if has_own_days else None)
        if is_full:  # nothing is known yet of what it holds
            warehouse.analyze(connection, model.table)
    for table in renewed:
        connection.exec_driver_sql(f"drop table {_before(table)}")


def _before(table: str) -> str:
    """The temporary table that keeps what the table held before this build."""
    return f"before_{table.replace('.', '_')}"


def _says_the_same(
    connection: sa.Connection, lookups: Mapping[str, frozenset[str] | None], renewed: Collection[str]
) -> bool:
    """Whether what is looked up did not change when it was made anew; false where nothing is."""
    for table in lookups.keys() & renewed:
        held, asked = connection.exec_driver_sql(f"select * from {table} limit 0").keys(), lookups[table]
        names = ", ".join(f'"{name}"' for name in held if asked is None or name in asked)
        now, then = (f"select {names} from {one}" for one in (table, _before(table)))
        differs = f"(({now}) except ({then})) union all (({then}) except ({now})) limit 1"
        if connection.exec_driver_sql(differs).first() is not None:
            return False
    return bool(lookups)


def _fill(connection: sa.Connection, model: Model, dialect: str, days: Collection[date] | None) -> None:
    """Make the table hold what its select gives: on those days, or (None) on all."""
    order = ""
    if model.grain and model.longest_span <= LONGEST_SPAN:
        # Sums, and so few rows. Without an order each of DuckDB's threads would leave rows of its own in
        # memory until the commit, 256 KiB a column, for each statement.
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
    """The selects of a check: over those days, or all rows; keys are compared a few days at a time."""
    if days is None and check.keys_of and check.is_by_day:
        days = days_held(connection, check.keys_of)
    if days is None or not check.is_by_day:
        yield translate(check.sql, dialect)
        return
    for span in spans(days, CHECKED_SPAN if check.keys_of else LONGEST_SPAN):
        yield restricted(check.sql, span, dialect)


def days_held(connection: sa.Connection, model: Model) -> set[date]:
    """The days on which the table or view has rows."""
    days = f"select distinct {model.day} from {model.table} where {model.day} is not null"
    return set(connection.exec_driver_sql(days).scalars())


def _check(connection: sa.Connection, check: Check, dialect: str, days: Collection[date] | None) -> None:
    """Run a check: over those days alone, where days stand for themselves and not all are meant."""
    for sql in statements(connection, check, dialect, days):
        found = connection.exec_driver_sql(sql).mappings().fetchmany(3)
        if found:
            told = "; ".join(", ".join(f"{k} {v!a}" for k, v in row.items()) for row in found)
            raise CheckFailedError(
                f"the check '{check.name}' found rows ({told}); the build was undone and readers keep "
                f"what they had{'; ' * bool(check.cure)}{check.cure}",
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
