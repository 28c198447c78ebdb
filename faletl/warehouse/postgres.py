"""PostgreSQL: the warehouse as schemas of a database, for several readers and several machines.

One process writes at a time. It takes an advisory lock, which the server frees when the session ends for
any reason. So faletl needs a session of its own, which a pooler in transaction mode does not give.
Readers see the last commit: a window is replaced, and a build is made, in one transaction. Tables that
readers know are never truncated: their rows are deleted and inserted, so that an earlier transaction
never sees a half-filled table.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import duckdb
import duckdb_sqlalchemy
import sqlalchemy as sa

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import (
    SettingsError,
    TamperedError,
    UsageError,
    WarehouseBusyError,
    WarehouseError,
    how_to_install,
)
from faletl.money import PRECISION, SCALE
from faletl.warehouse import ownership, schema
from faletl.warehouse.names import AS_TYPED, add_prefix, in_database, prefixed
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import BUILDS, COUNTED_UNIT, METADATA, OBJECTS, SCHEMAS, WAREHOUSE
from faletl.windows import instant

try:
    import psycopg
except ImportError:
    raise SettingsError(
        f"FALETL_WAREHOUSE: a PostgreSQL warehouse needs psycopg; {how_to_install('postgres')}"
    ) from None

T = TypeVar("T")

_LOCK = "hashtextextended('faletl writes ' || :table, 0)"
"""The number of the advisory lock: unlikely in other programs, and different for each warehouse."""

_HOLDERS_SESSION = f"""
    select application_name, backend_start
    from pg_locks join pg_stat_activity using (pid)
    where locktype = 'advisory' and objsubid = 1 and granted and datname = current_database()
        and (classid::bigint << 32) | objid::bigint = {_LOCK}
"""

_OURS = "faletl, "
"""The prefix of our session names; the process follows, cut to the length that fits."""

_VIEWS_OVER = """
    with recursive views (oid) as (
        select distinct ev_class from pg_depend join pg_rewrite on pg_rewrite.oid = objid
        where refobjid = to_regclass(:name) and ev_class <> refobjid
        union
        select ev_class from views join pg_depend on refobjid = views.oid
        join pg_rewrite on pg_rewrite.oid = objid and ev_class <> refobjid
    )
    select nspname || '.' || relname from views join pg_class using (oid)
    join pg_namespace on pg_namespace.oid = relnamespace
"""

_HAS_BUILD = """
    select exists (
        select from pg_class join pg_namespace on pg_namespace.oid = relnamespace
        where nspname = :reports and relname = 'rpt_freshness'
    )
"""
"""Whether a build exists: it makes all reports in one transaction, and readers may not read ops."""

_FOR_READERS = """
    select name from ops.objects
    where split_part(name, '.', 1) = any(:schemas) and to_regclass(name) is not null
    order by name
"""

_COMMENTS = """
    select nspname, obj_description(oid, 'pg_namespace') from pg_namespace where nspname = any(:schemas)
"""

_READERS = """
    with objects as (
        select oid, relowner, relacl from pg_class
        where relnamespace::regnamespace::text = any(:schemas)
            and relnamespace::regnamespace::text || '.' || relname in (select name from ops.objects)
    )
    select case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end
    from objects, aclexplode(relacl)
    where privilege_type = 'SELECT' and grantee <> relowner
    group by grantee
    having count(distinct oid) = (select count(*) from objects)
"""
"""The roles that may read every table of ours in marts and reports, as after `faletl grant`."""

_READERS_OF = """
    select case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end
    from pg_class, aclexplode(relacl)
    where oid = to_regclass(:name) and privilege_type = 'SELECT' and grantee <> relowner
"""

_TOO_POWERFUL = """
    select rolname from pg_roles where rolname = session_user and (
        rolsuper
        or pg_has_role(oid, 'pg_read_server_files', 'member')
        or pg_has_role(oid, 'pg_write_server_files', 'member')
        or pg_has_role(oid, 'pg_execute_server_program', 'member')
    )
"""

_OTHER_SHAPE = (psycopg.errors.InvalidTableDefinition, psycopg.errors.WrongObjectType)
"""Errors when a view cannot replace an existing one: other columns, or the name is of a table."""

_BLOCK_BYTES = 2**20  # sent at once

_NULL = r"\N"  # in CSV for DuckDB, which would skip the line of a single column that is empty

_READERS_SCHEMAS = ("marts", "reports")

_FUNCTIONS_IN = "staging"
"""The schema of our functions; our sessions have it as their search path."""

# Exact to 12 decimals, half away from zero. PostgreSQL chooses the number of decimals of a quotient of
# numerics, so whole numbers of 10^-12 are divided instead. The results equal those of the DuckDB macros,
# NULL included: results that these cannot compute are NULL here, too.
FUNCTIONS = (
    """
    create or replace function quotient(a numeric, b numeric) returns numeric
    language sql immutable parallel safe
    return case
        when
            abs(b) < 80000000000000000000
            and div(abs(a), nullif(abs(b), 0)) < 99999999999999999999999999
            then sign(a) * sign(b) * div(2000000000000 * abs(a) + abs(b), 2 * abs(b)) * 0.000000000001
    end
    """,
    """
    create or replace function proportion(amount numeric, part numeric, whole numeric) returns numeric
    language sql immutable parallel safe
    return case
        when
            abs(amount) < 1000000000000000000000000 and whole < 40000000000000000
            and (
                amount = 0
                or div(abs(part), nullif(whole, 0))
                < div(9999999999999999999999999999999999999, nullif(1000000000000 * abs(amount), 0))
            )
            then sign(amount) * sign(part)
                * div(2000000000000 * abs(amount) * abs(part) + whole, 2 * whole) * 0.000000000001
    end
    """,
    """
    create or replace function times(a numeric, b numeric) returns numeric
    language sql immutable parallel safe
    return proportion(a, b, 1)
    """,
    """
    create or replace function utc(instant timestamptz) returns timestamp
    language sql immutable parallel safe
    return instant at time zone 'UTC'
    """,
    f"""
    create or replace function unit_name(unit text) returns text
    language sql immutable parallel safe
    return coalesce(
        (regexp_match(lower(trim(unit)), '{COUNTED_UNIT}'))[2],
        (regexp_match(lower(trim(unit)), '{COUNTED_UNIT}'))[4]
    )
    """,
    f"""
    create or replace function unit_count(unit text) returns bigint
    language sql immutable parallel safe
    return
        cast(replace((regexp_match(lower(trim(unit)), '{COUNTED_UNIT}'))[1], ',', '') as bigint)
        * case (regexp_match(lower(trim(unit)), '{COUNTED_UNIT}'))[3]
            when 'k' then 1000 when 'm' then 1000000 else 1
        end
    """,
    """
    create or replace function currency_code(currency text) returns text
    language sql immutable parallel safe
    return coalesce(nullif(currency, ''), 'XXX')
    """,
    """
    create or replace function credential_id(api_key_id text, login_username text, label text)
    returns text
    language sql immutable parallel safe
    return case
        when api_key_id is not null then 'key:' || api_key_id
        when login_username is not null then 'user:' || login_username
        when label is null or label in ('', 'None') then 'none'
        else 'label:' || label
    end
    """,
)

_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

_TYPES: Mapping[str, tuple[str, str]] = {
    "bool": ("boolean", "BOOLEAN"),
    "int2": ("integer", "INTEGER"),
    "int4": ("integer", "INTEGER"),
    "int8": ("bigint", "BIGINT"),
    "numeric": (f"numeric({PRECISION},{SCALE})", f"DECIMAL({PRECISION},{SCALE})"),
    "date": ("date", "DATE"),
    "timestamp": ("timestamp without time zone", "TIMESTAMP"),
    "timestamptz": ("timestamp with time zone", "TIMESTAMPTZ"),
    "float8": ("double precision", "DOUBLE"),
}
"""By PostgreSQL's name of a result type: the type of a model's column, and DuckDB's type name."""

_TEXT = ('text collate "C"', "VARCHAR")

_UNKNOWN = (
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedTable,
)

_REFUSALS = (
    "authentication failed",
    "does not exist",
    "no pg_hba.conf entry",
    "permission denied",
    "statement pooling",
)


class PostgresWarehouse:
    """See `faletl.warehouse.protocol.Warehouse`."""

    dialect = "postgres"

    def __init__(self, settings: Settings, url: sa.URL) -> None:
        if not url.database:
            raise SettingsError("FALETL_WAREHOUSE: name the database, postgresql://host/database")
        self._settings = settings
        self._prefix = settings.schema_prefix
        self._is_checked = False  # whether the tables were compared with their definitions: done once
        self._url = url.set(drivername="postgresql+psycopg")
        self._where = f"the database {url.database} on {url.host or 'this machine'}"

    @contextmanager
    def lease(self, holder: str) -> Iterator[Lease]:
        """Become the only writer; see the protocol."""
        with self._exclusive(holder) as (connection, description):
            with connection.begin():
                if not _is_there(connection):
                    self._create(connection)
                elif schema.is_older(connection, self._where):
                    schema.upgrade(connection, self._where)
                if not self._is_checked:
                    schema.refuse_altered(connection, self._where)
                token = schema.take_token(connection, description)
            self._is_checked = True
            yield Lease(connection, token)

    @contextmanager
    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> Iterator[sa.Connection | None]:
        """Connect to read the loaded data; neither side waits. See the protocol."""
        with self._connected(is_reading=True) as connection:
            is_there = _is_there(connection)
            is_older = is_there and schema.is_older(connection, self._where, is_older_fine=is_older_fine)
            if not is_older or is_older_fine:
                yield connection if is_there else None
                return
        with self.lease("faletl, an upgrade"):
            pass
        with self._connected(is_reading=True) as connection:
            yield connection

    @contextmanager
    def published(self) -> Iterator[sa.Connection | None]:
        """Connect to read the last commit; see the protocol."""
        with self._connected(is_reading=True, is_readers=True) as connection:
            reports = {"reports": f"{self._prefix}reports"}
            has_build = connection.execute(sa.text(_HAS_BUILD), reports).scalar_one()
            # A server-side cursor accepts one statement, and fetches only the rows that are read.
            connection.execution_options(stream_results=True)
            yield connection if has_build else None

    def require_reader(self) -> None:
        """Refuse a superuser or a role with similar rights; see the protocol."""
        with self._connected(is_reading=True) as connection:
            role = connection.execute(sa.text(_TOO_POWERFUL)).scalar()
        if role is not None:
            raise UsageError(
                f"the role {role!a} of FALETL_WAREHOUSE may read files of the server, or more, and a "
                "query could use that; give another role access (faletl grant --reader ROLE) and "
                "connect with it"
            )

    def export_query(self, query: str, path: Path) -> bool:
        """Write the rows of a reader's query to a Parquet file; see the protocol."""
        with self.published() as connection:
            if connection is None:
                return False
            result = connection.exec_driver_sql(query, execution_options=AS_TYPED)
            columns = [(name, kind) for name, _, kind in _result_columns(result)]
            csv_path = path.with_suffix(".csv")
            with csv_path.open("w", encoding="utf-8", newline="") as file:
                for row in result:
                    file.write(",".join(map(_cell, row)) + "\n")
            self._as_parquet(csv_path, columns, path)
        return True

    def grant(self, role: str) -> None:
        """Let a role read marts and reports; see the protocol."""
        with self._connected() as connection, connection.begin():
            if not _is_there(connection):
                raise UsageError("nothing is loaded yet; run faletl run first")
            is_known = sa.text("select 1 from pg_roles where rolname = :role")
            if not connection.execute(is_known, {"role": role}).scalar():
                raise UsageError(f"there is no role {role!a} in {self._where}; create it first")
            schemas = in_database(connection, _READERS_SCHEMAS)
            objects = connection.execute(sa.text(_FOR_READERS), {"schemas": schemas}).scalars().all()
            if not objects:
                raise UsageError("nothing is built yet; run faletl build first")
            reader, inside = psycopg.sql.Identifier(role).as_string(), ", ".join(schemas)
            for statement in (
                f"grant usage on schema {inside} to {reader}",
                f"grant select on {', '.join(objects)} to {reader}",
                # An older faletl also opened tables that others would create there with its role.
                f"alter default privileges in schema {inside} revoke select on tables from {reader}",
            ):
                connection.exec_driver_sql(statement, execution_options=AS_TYPED)

    @contextmanager
    def rebuilding(
        self, holder: str, token: int, ask: Callable[[sa.Connection], T]
    ) -> Iterator[tuple[Warehouse, T | None]]:
        """Replace all rows in one transaction; until then readers see the old ones. See the protocol."""
        answer = None
        with self._exclusive(holder) as (connection, description), connection.begin():
            if _is_there(connection):
                schema.is_older(connection, self._where, is_older_fine=True)
                _make_schemas(connection)
                known = connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar() or 0
                token = max(token, known)
                with suppress(sa.exc.ProgrammingError), connection.begin_nested():
                    answer = ask(connection)  # not where a table or column is gone
                _empty(connection, token)
            else:
                self._create(connection, token, is_rebuild=True)
            yield _Rebuilding(self, connection, description), answer

    def load_rows(self, connection: sa.Connection, table: sa.Table, source: str, scratch: Path) -> None:
        """Send staged rows as CSV, block by block; see the protocol."""
        csv_path = scratch / f"{table.name}.csv"
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        statement = prefixed(f"copy {table.fullname} ({names}) from stdin (format csv)", self._prefix)
        with self._engine(scratch) as engine:
            engine.execute(
                f"copy (select {names} from {source}) to {quoted(csv_path)} (format csv, header false)"
            )
        try:
            with (
                _cursor(connection) as cursor,
                csv_path.open("rb") as file,
                cursor.copy(statement) as copy,
            ):
                while block := file.read(_BLOCK_BYTES):
                    copy.write(block)
        except psycopg.Error as error:
            raise WarehouseError(f"the warehouse refused the rows: {_reason_of(error)}") from None
        finally:
            csv_path.unlink()

    def export_rows(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Receive rows as CSV, and write them to a Parquet file; see the protocol."""
        csv_path = path.with_suffix(".csv")
        compiled = query.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        select = prefixed(str(compiled), self._prefix)
        try:
            with (
                _cursor(connection) as cursor,
                csv_path.open("wb") as file,
                cursor.copy(f"copy ({select}) to stdout (format csv, null '{_NULL}')", ()) as copy,
            ):
                for block in copy:
                    file.write(block)
        except psycopg.Error as error:
            raise WarehouseError(f"the warehouse refused to export rows: {_reason_of(error)}") from None
        typed = [
            (column.name, column.type.compile(duckdb_sqlalchemy.Dialect()))
            for column in query.selected_columns
        ]
        self._as_parquet(csv_path, typed, path)

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the functions; see the protocol."""
        for function in FUNCTIONS:
            connection.exec_driver_sql(function)

    def column_types(self, connection: sa.Connection, select: str) -> list[tuple[str, str]]:
        """Return names and types of the columns of a select; see the protocol."""
        with closing(connection.exec_driver_sql(f"{select} limit 0")) as result:
            return [(name, kind) for name, kind, _ in _result_columns(result)]

    def make_view(self, connection: sa.Connection, name: str, select: str) -> None:
        """Replace the view without dropping it, so that views of readers stay; see the protocol.

        A view that is already the same is not replaced, because that would wait for its readers.
        """
        if _is_view_of(connection, name, select):
            return
        roles = _readers(connection, name)
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(f"create or replace view {name} as {select}")
        except sa.exc.ProgrammingError as error:
            if not isinstance(error.orig, _OTHER_SHAPE):
                raise
            _drop(connection, name)
            connection.exec_driver_sql(f"create view {name} as {select}")
        _let_read(connection, name, roles)

    def make_table(self, connection: sa.Connection, name: str, select: str, by: str | None) -> None:
        """Empty the table if it has those columns, so that readers keep it; otherwise replace it."""
        columns = self.column_types(connection, select)
        if _columns(connection, name) == columns:
            connection.exec_driver_sql(f"delete from {name}")
            return
        roles = _readers(connection, name)
        _drop(connection, name)
        definitions = ", ".join(f'"{column}" {kind}' for column, kind in columns)
        connection.exec_driver_sql(f"create table {name} ({definitions})")
        _let_read(connection, name, roles)
        if by is not None:
            connection.exec_driver_sql(f"create index on {name} ({by})")

    def analyze(self, connection: sa.Connection, name: str) -> None:
        """Gather statistics: without them, joins of a new table are planned for a few rows."""
        connection.exec_driver_sql(f"analyze {name}")

    def publish(self, lease: Lease) -> str | None:
        """Record that the newest build is published: readers see it since its commit."""
        connection = lease.connection
        build, _ = schema.build_to_publish(connection)
        shown = connection.execute(
            sa.update(BUILDS)
            .where(BUILDS.c.build_id == build, BUILDS.c.published_at.is_(None))
            .values(published_at=datetime.now(UTC))
        )
        connection.commit()
        return f"in {self._where}" if shown.rowcount else None

    # --- Sessions ---------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self, holder: str) -> Iterator[tuple[sa.Connection, str]]:
        """Take the lock; yield the connection and a description of its holder for other processes."""
        parameters = {"table": f"{self._prefix}{WAREHOUSE.fullname}"}
        with self._connected() as connection:
            try:
                connection.execute(sa.text(f"select pg_advisory_lock({_LOCK})"), parameters)
            except sa.exc.DBAPIError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise
                connection.rollback()
                raise WarehouseBusyError(
                    f"the warehouse is in use by {_newest_holder(connection, parameters)}; waited "
                    f"{self._settings.lock_seconds:.0f} s, try again later"
                ) from None
            connection.commit()
            try:
                yield connection, f"{holder} ({_this_process()})"
            finally:
                # A pooler keeps the session, and clears it only if configured to.
                with suppress(sa.exc.DBAPIError, sa.exc.InvalidRequestError):
                    connection.rollback()
                    connection.execute(sa.text(f"select pg_advisory_unlock({_LOCK})"), parameters)
                    connection.commit()

    @contextmanager
    def _connected(
        self, *, is_reading: bool = False, is_readers: bool = False
    ) -> Iterator[sa.Connection]:
        """Open a session; with `is_reading` it sees one state and can change nothing."""
        engine = self._database
        if is_reading:
            engine = engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        try:
            connection = engine.connect()
        except sa.exc.DBAPIError as error:
            raise self._unreachable(error) from None
        try:
            yield connection
        except sa.exc.DBAPIError as error:
            if is_readers and not error.connection_invalidated:
                raise  # the reader's query is wrong
            reason = _reason_of(error.orig)
            if isinstance(error.orig, _UNKNOWN):
                raise TamperedError(schema.UNFIT.format(reason)) from None
            raise WarehouseError(f"the warehouse failed: {reason}; no partial change was kept") from None
        finally:
            connection.close()

    @cached_property
    def _database(self) -> sa.Engine:
        """The engine that opens sessions; it keeps none."""
        engine = sa.create_engine(
            self._url,
            poolclass=sa.pool.NullPool,
            connect_args={
                "application_name": f"{_OURS}{_this_process()}",
                "connect_timeout": 10,
                "client_encoding": "utf8",  # whatever the database is set to
                **_KEEPALIVES,
            },
        )
        sa.event.listen(engine, "connect", self._prepare)
        sa.event.listen(engine, "before_cursor_execute", _with_percent_signs, retval=True)
        add_prefix(engine, self._prefix)
        return engine

    def _prepare(self, session: Any, _record: object) -> None:
        self._refuse_shared(session)
        options = {
            "TimeZone": "'UTC'",
            "search_path": f"{self._prefix}{_FUNCTIONS_IN}",
            "lock_timeout": round(self._settings.lock_seconds * 1000) or 1,
            # A database or a role may set these to values that our SQL and psycopg do not expect.
            "datestyle": "ISO, MDY",
            "standard_conforming_strings": "on",
            "quote_all_identifiers": "off",
            # Our transactions do other work between their statements.
            "idle_in_transaction_session_timeout": 0,
            # A statement ends soon after its client has died, so that the lock becomes free.
            "client_connection_check_interval": 1000,
            # If the holder's machine disappears without closing, the lock becomes free soon.
            "tcp_keepalives_idle": 30,
            "tcp_keepalives_interval": 10,
            "tcp_keepalives_count": 3,
        }
        session.execute("; ".join(f"set {name} = {value}" for name, value in options.items()))
        session.commit()

    def _refuse_shared(self, session: psycopg.Connection[Any]) -> None:
        """Raise SettingsError if a pooler shares the session between transactions.

        This runs before anything is set or written, because others would get these settings.
        """
        first = _backend_of(session)
        session.commit()
        if first == session.info.backend_pid:
            return  # no pooler is in between
        session.prepare_threshold = None  # the next client would see our prepared statements
        with closing(psycopg.connect(session.info.dsn, password=session.info.password)) as another:
            second = _backend_of(another)  # no other client gets it before `another` is closed
            is_shared = second == first or _backend_of(session) != first
        session.commit()
        if is_shared:
            raise SettingsError(
                f"FALETL_WAREHOUSE: {self._where} is reached by a pooler that shares sessions between "
                "transactions, and faletl needs one of its own; nothing was changed. Name the server "
                "itself, or a pool in session mode (pool_mode = session in PgBouncer)"
            )

    def _unreachable(self, error: sa.exc.DBAPIError) -> Exception:
        reason = _reason_of(error.orig)
        if any(words in reason for words in _REFUSALS):
            return SettingsError(f"FALETL_WAREHOUSE: {self._where} cannot be used: {reason}")
        return WarehouseError(f"the warehouse cannot be reached: {reason}")

    def _create(self, connection: sa.Connection, token: int = 0, *, is_rebuild: bool = False) -> None:
        existing = _what_is_left(connection, self._where)
        if existing and not is_rebuild:
            raise TamperedError(
                f"{self._where} has {min(existing)}, but no ledger any more; faletl rebuild "
                "makes the warehouse again from the landed pages"
            )
        encoding = connection.execute(sa.text("show server_encoding")).scalar_one()
        if encoding != "UTF8":
            raise SettingsError(
                f"FALETL_WAREHOUSE: {self._where} has the encoding {encoding}, which cannot hold every "
                "text of fal; nothing was changed. Create a database with encoding 'UTF8'"
            )
        try:
            with connection.begin_nested():
                held = _make_schemas(connection)
                if existing:
                    _empty(connection, token)
                    built = existing.intersection(in_database(connection, ownership.models()))
                    ownership.register(connection, built)
                else:
                    schema.create(connection, token, held)
                self.define_functions(connection)
        except sa.exc.ProgrammingError as error:
            raise SettingsError(
                f"FALETL_WAREHOUSE: no warehouse can be created in {self._where}: "
                f"{_reason_of(error.orig)}; "
                "give faletl a database in which its role may create schemas"
            ) from None

    # --- Parquet ----------------------------------------------------------------------------------

    def _as_parquet(self, csv_path: Path, columns: Sequence[tuple[str, str]], path: Path) -> None:
        """Convert CSV to a Parquet file; an unquoted `_NULL` is null."""
        types = ", ".join(f"{quoted(name)}: {quoted(kind)}" for name, kind in columns)
        with self._engine(path.parent) as engine:
            engine.execute(
                f"copy (select * from read_csv({quoted(csv_path)}, columns = {{{types}}}, "
                f"header = false, auto_detect = false, nullstr = '{_NULL}', allow_quoted_nulls = false, "
                f"delim = ',', quote = '\"', escape = '\"')) to {quoted(path)} (format parquet)"
            )
        csv_path.unlink()

    def _engine(self, scratch: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        return duck.engine(self._settings.memory, scratch)


class _Rebuilding(PostgresWarehouse):
    """A warehouse inside a transaction that is not committed yet."""

    def __init__(
        self, warehouse: PostgresWarehouse, connection: sa.Connection, description: str
    ) -> None:
        self._settings, self._url, self._where = warehouse._settings, warehouse._url, warehouse._where
        self._prefix = warehouse._prefix
        self._connection, self._description = connection, description

    @contextmanager
    def lease(self, holder: str) -> Iterator[Lease]:
        token = schema.take_token(self._connection, self._description)
        yield Lease(self._connection, token, is_one_transaction=True)


def _backend_of(session: psycopg.Connection[Any]) -> int:
    """Return the server process of the session's open transaction, or of its next."""
    (pid,) = session.execute("select pg_backend_pid()").fetchone() or (0,)
    return int(pid)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_there(connection: sa.Connection) -> bool:
    query = sa.text("select to_regclass(:name) is not null")
    (name,) = in_database(connection, [WAREHOUSE.fullname])
    return bool(connection.execute(query, {"name": name}).scalar())


def _newest_holder(connection: sa.Connection, parameters: Mapping[str, str]) -> str:
    """Describe who holds the lock, and since when.

    A rebuild, or a very recent holder, has not committed its description yet: then the name of its
    session is used.
    """
    session = connection.execute(sa.text(_HOLDERS_SESSION), parameters).first()
    row = None
    if _is_there(connection):
        row = connection.execute(sa.select(WAREHOUSE.c.holder, WAREHOUSE.c.held_since)).one()
    holder, since = row if row and row.held_since else ("another process", None)
    if session and session.application_name.removeprefix(_OURS) not in holder:
        holder, since = session
    return f"{holder}, since {instant(since.replace(microsecond=0))}" if since else holder


def _result_columns(result: sa.CursorResult[Any]) -> list[tuple[str, str, str]]:
    """Return name, PostgreSQL type and DuckDB type of each column of a result."""
    columns = []
    for name, oid, *_ in result.cursor.description or () if result.cursor is not None else ():
        known = psycopg.adapters.types.get(cast(int, oid))
        columns.append((name, *_TYPES.get(known.name if known else "", _TEXT)))
    return columns


def _what_is_left(connection: sa.Connection, where: str) -> set[str]:
    """Return the objects of a warehouse that lost its ledger, in schemas that still have our comments.

    Raises:
        SettingsError: objects of others have names that faletl needs.
    """
    schemas = in_database(connection, SCHEMAS)
    functions = re.findall(r"function (\w+)", "".join(FUNCTIONS))
    planned = {*ownership.planned(), *(f"{_FUNCTIONS_IN}.{name}" for name in functions)}
    existing = ownership.objects(connection, schemas).intersection(in_database(connection, planned))
    comments = connection.execute(sa.text(_COMMENTS), {"schemas": schemas})
    ours = set(zip(schemas, SCHEMAS.values(), strict=True)).intersection(map(tuple, comments))
    own_schemas = {name for name, _ in ours}
    ownership.refuse((name for name in existing if name.split(".")[0] not in own_schemas), where)
    return existing


def _make_schemas(connection: sa.Connection) -> list[str]:
    """Create the schemas that do not exist; return the names of all our schemas."""
    existing = connection.execute(sa.text("select nspname from pg_namespace")).scalars().all()
    schemas = in_database(connection, SCHEMAS)
    for name, purpose in zip(schemas, SCHEMAS.values(), strict=True):
        if name not in existing:
            connection.execute(sa.schema.CreateSchema(name))
            connection.exec_driver_sql(f"comment on schema {name} is {quoted(purpose)}")
    return schemas


def _is_view_of(connection: sa.Connection, name: str, select: str) -> bool:
    """Return whether the view exists and has exactly this select."""
    (real_name,) = in_database(connection, [name])
    same = sa.text(
        "select exists (select from pg_class where oid = to_regclass(:name) and relkind = 'v' "
        "and pg_get_viewdef(oid) = pg_get_viewdef('pg_temp.faletl_view'::regclass))"
    )
    try:
        with connection.begin_nested() as attempt:
            connection.exec_driver_sql(f"create temporary view faletl_view as {select}")
            is_same = connection.execute(same, {"name": real_name}).scalar_one()
            attempt.rollback()
    except sa.exc.ProgrammingError:  # the role may make no temporary views, or the select is wrong
        return False
    return bool(is_same)


def _readers(connection: sa.Connection, name: str) -> set[str]:
    """Return the roles that may read the object; for marts and reports, also those that may read all."""
    (real_name,) = in_database(connection, [name])
    roles = set(connection.execute(sa.text(_READERS_OF), {"name": real_name}).scalars())
    if name.split(".")[0] in _READERS_SCHEMAS:
        schemas = in_database(connection, _READERS_SCHEMAS)
        roles.update(connection.execute(sa.text(_READERS), {"schemas": schemas}).scalars())
    return roles


def _let_read(connection: sa.Connection, name: str, roles: Collection[str]) -> None:
    """Grant the roles the right to read the object."""
    if roles:
        connection.exec_driver_sql(f"grant select on {name} to {', '.join(sorted(roles))}")


def _columns(connection: sa.Connection, table: str) -> list[tuple[str, str]]:
    """Return names and types of the columns that a table has in the database, in order."""
    rows = connection.execute(
        sa.text(
            """
            select
                attname,
                format_type(atttypid, atttypmod)
                || case when collname = 'C' then ' collate "C"' else '' end
            from pg_attribute left join pg_collation on pg_collation.oid = attcollation
            where attrelid = to_regclass(:table) and attnum > 0 and not attisdropped
            order by attnum
            """
        ),
        {"table": in_database(connection, [table])[0]},
    )
    return [(name, kind) for name, kind in rows]


def _empty(connection: sa.Connection, token: int) -> None:
    """Empty all tables of raw and ops except `ops.objects`; create the missing ones."""
    for table in METADATA.sorted_tables:
        if table is not OBJECTS or not _columns(connection, table.fullname):
            _make_empty(connection, table)
    schema.initialise(connection, token)


def _make_empty(connection: sa.Connection, table: sa.Table) -> None:
    """Make our table empty; a table with the right columns is kept, for its readers."""
    defined = [(c.name, c.type.compile(connection.dialect).replace(", ", ",")) for c in table.columns]
    existing = _columns(connection, table.fullname)
    if [(name, kind.lower()) for name, kind in defined] == [
        (name, kind.lower()) for name, kind in existing
    ]:
        connection.execute(sa.delete(table))
        return
    _drop(connection, table.fullname)
    table.create(connection, checkfirst=False)


def _drop(connection: sa.Connection, name: str) -> None:
    """Drop our table or view, if it exists, with our views that read it.

    Raises:
        SettingsError: a foreign object depends on it; nothing is dropped.
    """
    relation_kind = sa.text("select relkind from pg_class where oid = to_regclass(:name)")
    (real_name,) = in_database(connection, [name])
    kind = connection.execute(relation_kind, {"name": real_name}).scalar()
    if kind is None:
        return
    readers = set(connection.execute(sa.text(_VIEWS_OVER), {"name": real_name}).scalars())
    if foreign_views := sorted(readers.difference(in_database(connection, ownership.planned()))):
        raise SettingsError(
            f"{real_name} gets other columns, but foreign views read it: {', '.join(foreign_views)}; "
            "nothing was changed. Drop these views, run faletl build, and create them again"
        )
    try:
        with connection.begin_nested():
            if ours := ", ".join(sorted(readers)):  # of one statement, as one may read another
                connection.exec_driver_sql(f"drop view {ours}", execution_options=AS_TYPED)
            connection.exec_driver_sql(f"drop {'view' if kind == 'v' else 'table'} {name}")
    except sa.exc.DBAPIError as error:
        if not isinstance(error.orig, psycopg.errors.DependentObjectsStillExist):
            raise
        dependents = "; ".join((error.orig.diag.message_detail or "").splitlines())
        raise SettingsError(
            f"{real_name} gets other columns, but foreign objects depend on it: {dependents}; "
            "nothing was changed. Drop these objects, run faletl build, and create them again"
        ) from None


def _cursor(connection: sa.Connection) -> psycopg.Cursor[Any]:
    session = connection.connection.driver_connection
    assert isinstance(session, psycopg.Connection)  # noqa: S101  # the URL says so
    return session.cursor()


def _with_percent_signs(
    _connection: object,
    _cursor: object,
    statement: str,
    parameters: Any,
    context: Any,
    _is_many: bool,
) -> tuple[str, Any]:
    """Escape percent signs in our SQL without parameters, which psycopg would take for parameters."""
    is_ours = context.compiled is None and not parameters
    return (statement.replace("%", "%%") if is_ours else statement), parameters


def _cell(value: object) -> str:
    """Format a value as CSV, for DuckDB."""
    if value is None:
        return _NULL
    text = f"{value:f}" if isinstance(value, Decimal) else str(value)
    return '"' + text.replace('"', '""') + '"'


def _reason_of(error: object) -> str:
    """Return the first line of the server's message."""
    return str(error).strip().splitlines()[0]
