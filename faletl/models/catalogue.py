"""Models: run sql/ layer by layer, then its checks, in one transaction.

A model is one bare select in a file: its first comment line says what a row is for, its `grain` line
names the key, a `days` line the column that puts a row on a UTC day, and a comment behind a column
says what the column holds. A column that passes through unchanged keeps the comment from where it was
defined, in an earlier model or in the catalogue.

A build makes anew what changed since the last one: of a model whose rows all come from rows of the
same day, the days that were loaded; any other model as a whole, if anything that it reads changed. A
model that beside that looks things up in dimensions is made by day as long as these say the same.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from graphlib import TopologicalSorter

import sqlalchemy as sa
import sqlglot
from sqlglot import exp

from faletl import __version__
from faletl.config import Settings
from faletl.errors import CheckFailedError, TamperedError, WarehouseError
from faletl.landing.storage import sql_folder
from faletl.line.replace import changed_days, fence
from faletl.models import seeds
from faletl.money import plain
from faletl.resources import RESOURCES
from faletl.warehouse import Lease, Warehouse, alerts, ownership, quoted
from faletl.warehouse.tables import (
    BUILDS,
    LAYERS,
    RAW,
    SCHEMA_VERSION,
    SCHEMAS,
    SEEDS,
    WAREHOUSE,
)

log = logging.getLogger(__name__)

SOURCE_DIALECT = "duckdb"

TELL_RUNAWAYS = 5
"""Of so many new runaway charges a build tells each."""

LONGEST_SPAN = 31
"""Days that one statement adds up: memory does not grow with the history."""

SPANS = {"": LONGEST_SPAN, "one at a time": 1, "row by row": 36_500}
"""Days that one statement builds, by what the model's head says of its days."""

CHECKED_SPAN = 7
"""Days of which a statement compares all rows with each other."""

BY_WINDOW = ("ops.loads", "ops.restatements", "ops.quarantine", "ops.holds", "ops.failures")
"""Tables beside raw whose rows have a day: that of `window_start`."""


@dataclass(frozen=True, slots=True)
class Model:
    """One select of sql/. `grain` is empty where rows need not be unique.

    `day` is the column that puts a row on a day, if there is one; `longest_span` is how many of its
    days one statement builds. `is_of_now`: it is never out of date, even if nothing was built.
    """

    layer: str
    name: str
    sql: str
    comment: str
    grain: tuple[str, ...]
    day: str | None
    longest_span: int = LONGEST_SPAN
    is_of_now: bool = False

    @property
    def table(self) -> str:
        """Its table or view, with its schema."""
        return f"{self.layer}.{self.name}"

    @property
    def is_view(self) -> bool:
        """Whether it is kept as a view: it only renames and casts, or says what ops says now."""
        return self.name.startswith("stg_") or self.is_of_now

    @property
    def is_by_day(self) -> bool:
        """Whether a row depends on rows of its own day alone, so that days can be built one by one."""
        return self.day is not None and all(_has_days(table) for table in _all_read(self.sql))

    @property
    def lookups(self) -> Mapping[str, frozenset[str] | None]:
        """Where rows of a day look things up: marts without days, and their columns (None: all).

        Empty for a model that reads nothing but days, and for one that cannot be built by day at all.
        """
        return _lookups(self.sql) if self.day is not None and not self.is_by_day else {}


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive UTC days, from `first` to before `end`."""

    first: date
    end: date


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


@cache
def models() -> tuple[Model, ...]:
    """Every model, in build order."""
    found = {}
    for layer in LAYERS:
        for path in sorted((sql_folder() / layer).glob("*.sql")):
            sql = path.read_text("utf-8")
            comment, *lines = (line.removeprefix("-- ") for line in sql.splitlines())
            told = dict(line.split(": ", 1) for line in lines[:2] if ": " in line)
            keys = told["grain"].split(";")[0]
            key = () if keys == "none" else tuple(keys.split(", "))
            day, _, each = told.get("days", "").split(";")[0].partition(", ")
            model = Model(layer, path.stem, sql, comment, key, day or None, SPANS[each], "view" in told)
            found[model.table] = model
    order = TopologicalSorter(
        {table: sorted(tables_read(model.sql) & found.keys()) for table, model in found.items()}
    ).static_order()
    return tuple(sorted((found[table] for table in order), key=lambda m: LAYERS.index(m.layer)))


@dataclass(frozen=True, slots=True)
class Check:
    """A select that must return no rows. `is_by_day`: what holds for each day holds for all.

    `keys_of` is the model whose keys it compares: in memory, so that it looks at few days at a time.
    `cure` is what a person can do about rows that it finds, where its head says so.
    """

    name: str
    sql: str
    is_by_day: bool
    keys_of: Model | None = None
    cure: str = ""


_CURE = "-- cure: "


@cache
def checks() -> tuple[Check, ...]:
    """Every check: those of sql/checks, the grain of each model, the ledger of each raw table."""
    found = []
    for path in sorted((sql_folder() / "checks").glob("*.sql")):
        sql = path.read_text("utf-8")
        _, days, more, *_ = sql.splitlines()
        cure = more.removeprefix(_CURE) if more.startswith(_CURE) else ""
        found.append(Check(path.stem, sql, days == "-- days: each by itself", cure=cure))
    for model in models():
        key = ", ".join(model.grain)
        if key and not _has_fact(model):
            sql = (
                f"select {key}, count(*) as copies from {model.table} group by {key} having count(*) > 1"
            )
            found.append(Check(f"grain of {model.table}", sql, model.day is not None, model))
    for name, table in RAW.items():
        found.append(Check(f"loads of {table.fullname}", _ledger_check(name, table), is_by_day=True))
    return tuple(found)


def _has_fact(model: Model) -> bool:
    """Whether a fact of the same key holds the rows of the view: what came twice is found there."""
    return model.is_view and any(
        fact.layer == "marts" and fact.grain == model.grain and model.table in tables_read(fact.sql)
        for fact in models()
    )


def _ledger_check(resource: str, table: sa.Table) -> str:
    """What the ledger calls current stands in the raw table, row for row, and nothing else does.

    Without functions of ours: it is asked of older warehouses, too. By the number of the day, as
    DuckDB takes a microsecond to find in a calendar when it began; a double tells the last microsecond
    of a day from the next one.
    """
    time = RESOURCES[resource].time
    day = f'floor(extract(epoch from "{time}") / 86400)'
    start = f"to_timestamp(86400 * {day})" if time else "_snapshot_at"
    cost = "sum(cost_total)" if "cost_total" in table.c else "0"
    return f"""
        with held as (
            select
                _account, {start} as held_start, count(*) as held_rows, {cost} as held_cost
            from {table.fullname} group by 1, 2
        ),
        entered as (
            select account, window_start, rows as entered_rows, cost_total as entered_cost
            from ops.loads where resource = '{resource}' and is_current
        )
        select
            coalesce(_account, account) as account, coalesce(held_start, window_start) as window_start,
            held_rows, entered_rows, held_cost, entered_cost
        from held full join entered on _account = account and held_start = window_start
        where coalesce(held_rows, 0) <> coalesce(entered_rows, 0)
            or coalesce(held_cost, 0) <> coalesce(entered_cost, 0)
    """


@cache
def translate(sql: str, dialect: str) -> str:
    """The same select in another database's SQL."""
    if dialect == SOURCE_DIALECT:
        return sql
    return sqlglot.transpile(sql, read=SOURCE_DIALECT, write=dialect, comments=False)[0]


@cache
def column_comments() -> dict[str, dict[str, str]]:
    """For each table and model the comment of each of its columns.

    A column without a comment of its own has that of the column of its name in the tables which the
    model reads, where these agree.

    Raises:
        ValueError: a column has no comment, or inherits more than one; a test keeps it from happening.
    """
    written = [*RAW.values(), *SEEDS]
    known = {t.fullname: {c.name: str(c.comment) for c in t.columns} for t in written}
    for model in models():
        select = sqlglot.parse_one(model.sql, read=SOURCE_DIALECT, into=exp.Select)
        read = sorted(tables_read(model.sql) & known.keys())
        known[model.table] = {}
        for column in select.selects:
            own = " ".join(" ".join(column.comments or []).split())
            name = column.unalias().name or column.alias
            inherited = {known[table][name] for table in read if name in known[table]}
            if not own and len(inherited) != 1:
                raise ValueError(f"{model.table}.{column.alias_or_name}: {inherited or 'no comment'}")
            known[model.table][column.alias_or_name] = own or inherited.pop()
    return known


# --- What depends on what -------------------------------------------------------------------------


_COMMENT = re.compile(r"--.*")
_TABLE = re.compile(rf"\b(?:{'|'.join(SCHEMAS)})\.\w+")


@cache
def tables_read(sql: str) -> frozenset[str]:
    """The tables that a select names, with their schemas. Without a parser, which takes longer."""
    return frozenset(_TABLE.findall(_COMMENT.sub("", sql)))


@cache
def _all_read(sql: str) -> frozenset[str]:
    """The same, and the tables that stand behind its views."""
    views = {model.table: model.sql for model in models() if model.is_view}
    read = tables_read(sql)
    return read.union(*(_all_read(views[table]) for table in read & views.keys()))


@cache
def sources(sql: str) -> frozenset[str]:
    """The resources from which, in the end, the rows of a select come."""
    known = {model.table: model.sql for model in models()}
    read = tables_read(sql)
    own = {table.removeprefix("raw.") for table in read if table.startswith("raw.")}
    return frozenset(own).union(*(sources(known[table]) for table in read & known.keys()))


def _has_days(table: str) -> bool:
    """Whether the table's rows are of days; what stands behind a view is another question."""
    if table.startswith("raw."):
        return RESOURCES[table.removeprefix("raw.")].window == "day"
    model = next((model for model in models() if model.table == table), None)
    if model is not None:
        return model.is_view or model.is_by_day
    return table in BY_WINDOW or table.startswith("staging.seed_")


@cache
def _lookups(sql: str) -> Mapping[str, frozenset[str] | None]:
    others = {table for table in _all_read(sql) if not _has_days(table)}
    if not all(table.startswith("marts.") for table in others):
        return {}
    tree = sqlglot.parse_one(sql, read=SOURCE_DIALECT)
    named = frozenset(column.name for column in tree.find_all(exp.Column))
    named |= {one.name for join in tree.find_all(exp.Join) for one in join.args.get("using") or ()}
    found: dict[str, frozenset[str] | None] = dict.fromkeys(others, named)
    for table in tree.find_all(exp.Table):
        name, select = f"{table.db}.{table.name}", table.parent_select
        stars = {one.text("table") for one in select.selects if one.is_star} if select else set()
        if name in found and stars & {"", table.alias_or_name}:
            found[name] = None
    return found


def restricted(sql: str, span: Span, dialect: str = SOURCE_DIALECT) -> str:
    """The select over those rows alone that fall on the days of the span, where rows have a day."""
    some = _restricted(sql, dialect)
    return some.replace(f"{_SOME.first}", f"{span.first}").replace(f"{_SOME.end}", f"{span.end}")


_SOME = Span(date(1, 1, 1), date(1, 1, 2))
"""Days that no SQL of ours names: a select is parsed once, and then holds for any days."""


@cache
def _restricted(sql: str, dialect: str) -> str:
    tree = sqlglot.parse_one(sql, read=SOURCE_DIALECT)
    for table in list(tree.find_all(exp.Table)):
        rows = _rows_of_some_days(f"{table.db}.{table.name}")
        if rows is not None:
            part = sqlglot.parse_one(rows, read=SOURCE_DIALECT, into=exp.Select)
            table.replace(part.subquery(table.alias or table.name))
    return tree.sql(dialect)


def _rows_of_some_days(table: str) -> str | None:
    """The select of a table's rows on `_SOME` days; None where its rows have no day."""
    model = next((model for model in models() if model.table == table), None)
    if model is not None and model.is_view:
        return _restricted(model.sql, SOURCE_DIALECT)
    if model is not None:
        column, kind, zone = model.day, "date", ""
    elif table.startswith("raw."):
        column, kind, zone = (
            RESOURCES[table.removeprefix("raw.")].time or "_snapshot_at",
            "timestamptz",
            "Z",
        )
    elif table in BY_WINDOW:
        column, kind, zone = "window_start", "timestamptz", "Z"
    else:
        return None
    if column is None:
        return None
    time = " 00:00:00" if zone else ""
    return (
        f"select * from {table} where \"{column}\" >= {kind} '{_SOME.first}{time}{zone}' "
        f"and \"{column}\" < {kind} '{_SOME.end}{time}{zone}'"
    )


def spans(days: Collection[date], longest: int = LONGEST_SPAN) -> Iterator[Span]:
    """The days as few spans of consecutive ones, none of more than `longest`, in order."""
    first = end = None
    for day in sorted(days):
        if first is None or day != end or (end - first).days >= longest:
            if first is not None and end is not None:
                yield Span(first, end)
            first = day
        end = day + timedelta(days=1)
    if first is not None and end is not None:
        yield Span(first, end)


# --- Building -------------------------------------------------------------------------------------


def needs_build(settings: Settings, connection: sa.Connection) -> bool:
    """Whether raw, the SQL or the seeds changed since the last build."""
    last = _last_build(connection)
    loaded = connection.execute(sa.select(WAREHOUSE.c.data_version)).scalar_one()
    return last is None or last[:2] != (loaded, _models_digest(settings))


def is_behind(settings: Settings, connection: sa.Connection) -> bool:
    """Whether it needs a build, or rows were set aside since: no reason to build, but a difference."""
    return needs_build(settings, connection) or bool(news(connection))


def news(connection: sa.Connection) -> Collection[str]:
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


def build(
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
                connection.exec_driver_sql(_REMEMBER_RUNAWAYS)
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
            runaways, dearest = _new_runaways(connection, started_at, is_first=last is None)
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
    looked_up = {table for model in models() for table in model.lookups}
    renewed = set[str]()
    for model in models():
        days = _days_of(model.sql, changed)
        if model.is_view or not (days or is_full):
            continue
        if model.table in looked_up and not is_full:
            before = _before(model.table)
            connection.exec_driver_sql(f"create temporary table {before} as select * from {model.table}")
            renewed.add(model.table)
        is_by_day = model.is_by_day or (
            not is_full and _says_the_same(connection, model.lookups, renewed)
        )
        _fill(connection, model, warehouse.dialect, days if is_by_day else None)
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


# --- What ran away -------------------------------------------------------------------------------

_RUNAWAYS = "reports.rpt_runaway_requests"


_RUNAWAY_KEY = ("account", "event_hash", "event_ordinal")

_REMEMBER_RUNAWAYS = f"create temporary table runaways_before as select * from {_RUNAWAYS}"


def _new_runaways(
    connection: sa.Connection, at: datetime, *, is_first: bool
) -> tuple[int, tuple[str, ...]]:
    """How many charges of the report it did not have before, and sentences about the dearest.

    Each of them is an alert, until the report does not have it any longer.
    """
    new = connection.exec_driver_sql(
        f"select * from {_RUNAWAYS} as now {'' if is_first else _not_in('runaways_before', 'now')} "
        "order by cost_total desc, requested_at, event_hash"
    )
    found = [_runaway_alert(row) for row in new.mappings()]
    alerts.raise_all(connection, found, at)
    if not is_first:
        gone = connection.exec_driver_sql(
            f"select * from runaways_before as now {_not_in(_RUNAWAYS, 'now')}"
        )
        alerts.resolve_all(connection, [_runaway_alert(row) for row in gone.mappings()], at)
        connection.exec_driver_sql("drop table runaways_before")
    return len(found), tuple(one.detail for one in found[:TELL_RUNAWAYS])


def _not_in(table: str, rows: str) -> str:
    same = " and ".join(f"{rows}.{name} = known.{name}" for name in _RUNAWAY_KEY)
    return f"where not exists (select 1 from {table} as known where {same})"


def _runaway_alert(row: sa.RowMapping) -> alerts.Alert:
    request_id = str(row["request_id"])
    return alerts.Alert(
        kind="runaway",
        account=row["account"],
        subject=request_id,
        detail=_runaway_sentence(row),
        key=(
            request_id, str(row["endpoint_id"]), row["requested_at"].isoformat(),
            plain(row["cost_total"]), str(row["event_ordinal"]),
        ),
    )  # fmt: skip


def _runaway_sentence(row: sa.RowMapping) -> str:
    usual = "and nothing is known of what is usual"
    if row["usual_cost"] is not None:
        usual = f"where {row['usual_cost'].normalize():f} is usual"
    endpoint_id, request_id = (ascii(row[name])[1:-1][:80] for name in ("endpoint_id", "request_id"))
    return (
        f"{endpoint_id} was charged {row['cost_total'].normalize():f} {row['currency']} for the "
        f"request {request_id} of {row['requested_at']:%Y-%m-%d %H:%M} UTC, {usual} "
        f"({row['reason']})"
    )


def _models_digest(settings: Settings) -> str:
    digest = hashlib.sha256(f"{__version__} {SCHEMA_VERSION}".encode())
    for path in sorted(sql_folder().rglob("*.*")):
        digest.update(path.read_bytes())
    for seed in (settings.units, settings.owners):
        digest.update(seed.read_bytes() if seed and seed.exists() else b"")
    digest.update(repr(sorted(settings.thresholds.items())).encode())
    return digest.hexdigest()
