"""DuckDB: the warehouse as one file, readers on a copy of it.

One process writes at a time. A lock file beside the database makes others wait and tells them who
holds it; the operating system frees it when its holder dies. What a writer does between opening and
closing the file is one lease.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import filelock
import sqlalchemy as sa
import tenacity

from faletl import duck
from faletl.config import Settings
from faletl.duck import quoted
from faletl.errors import (
    ExhaustedError,
    FaletlError,
    SettingsError,
    StorageError,
    TamperedError,
    UsageError,
    WarehouseBusyError,
    WarehouseError,
)
from faletl.files import copy_file, free_space, sync
from faletl.warehouse import ownership, schema
from faletl.warehouse.names import AS_TYPED, add_prefix
from faletl.warehouse.protocol import Lease, Warehouse
from faletl.warehouse.tables import BUILDS, COUNTED_UNIT, WAREHOUSE
from faletl.windows import instant

log = logging.getLogger(__name__)
T = TypeVar("T")

_POLL_SECONDS = 0.2

_LITTLE = 128 * 2**20  # bytes of a file; an hourly run behind a year of days costs a fifth less CPU

# Exact to 12 decimals, half away from zero; DECIMAL / DECIMAL would be a DOUBLE in DuckDB, and a product
# of two amounts overflows from 10^14 on. So amounts become whole numbers of 10^-12, which are multiplied
# and divided by hand, a few decimals at a time, so that no step overflows. What is too large for that is
# NULL, and does not end a build; the functions of PostgreSQL have the same bounds. Divided by zero such
# numbers are NULL to DuckDB, too: a case that asked for it would have these terms computed once more.
MACROS = (
    """
    create or replace macro trillionths(a) as
        cast(replace(cast(abs(cast(a as decimal(38,12))) as varchar), '.', '') as hugeint)
    """,
    """
    create or replace macro whole_quotient(a, b) as
        case when a // b < 99999999999999999999999999 then a // b end * 1000000000000
        + (a % b * 1000000) // b * 1000000
        + (2 * (a % b * 1000000 % b) * 1000000 + b) // (2 * b)
    """,
    """
    create or replace macro quotient(a, b) as
        sign(a) * sign(b) * cast(whole_quotient(
            trillionths(a), trillionths(case when abs(b) < 80000000000000000000 then b end)
        ) as decimal(38,0)) * 0.000000000001
    """,
    # One step of a long multiplication and division: `rest` is what the digits before left over.
    """
    create or replace macro next_digits(rest, part, amount, digits) as
        rest * 1000000000 + part * (amount // digits % 1000000000)
    """,
    """
    create or replace macro whole_proportion(amount, part, whole) as
        case
            when amount = 0 or part // whole < 9999999999999999999999999999999999999 // amount
                then part // whole
        end * amount
        + next_digits(0, part % whole, amount, 1000000000000000000000000000)
            // whole * 1000000000000000000000000000
        + next_digits(
            next_digits(0, part % whole, amount, 1000000000000000000000000000) % whole,
            part % whole, amount, 1000000000000000000
        ) // whole * 1000000000000000000
        + next_digits(
            next_digits(
                next_digits(0, part % whole, amount, 1000000000000000000000000000) % whole,
                part % whole, amount, 1000000000000000000
            ) % whole,
            part % whole, amount, 1000000000
        ) // whole * 1000000000
        + (2 * next_digits(
            next_digits(
                next_digits(
                    next_digits(0, part % whole, amount, 1000000000000000000000000000) % whole,
                    part % whole, amount, 1000000000000000000
                ) % whole,
                part % whole, amount, 1000000000
            ) % whole,
            part % whole, amount, 1
        ) + whole) // (2 * whole)
    """,
    # amount * part / whole, for a whole above zero.
    """
    create or replace macro proportion(amount, part, whole) as
        sign(amount) * sign(part) * cast(whole_proportion(
            trillionths(case when abs(amount) < 1000000000000000000000000 then amount end),
            trillionths(part),
            trillionths(case when whole < 40000000000000000 then whole end)
        ) as decimal(38,0)) * 0.000000000001
    """,
    """
    create or replace macro times(a, b) as proportion(a, b, 1)
    """,
    # The clock of UTC at an instant, without the tables of time zones, which are slow to ask.
    """
    create or replace macro utc(instant) as make_timestamp(epoch_us(instant))
    """,
    # A number in front of a unit is a factor: `30 frames`, `1,000 tokens`, `1m tokens`. Only of texts
    # and tokens, k and m are thousands and millions: `2k images` are large ones.
    f"""
    create or replace macro unit_name(unit) as nullif(
        regexp_extract(lower(trim(unit)), '{COUNTED_UNIT}', 2)
        || regexp_extract(lower(trim(unit)), '{COUNTED_UNIT}', 4),
        ''
    )
    """,
    f"""
    create or replace macro unit_count(unit) as
        cast(nullif(
            replace(regexp_extract(lower(trim(unit)), '{COUNTED_UNIT}', 1), ',', ''), ''
        ) as bigint)
        * case regexp_extract(lower(trim(unit)), '{COUNTED_UNIT}', 3)
            when 'k' then 1000 when 'm' then 1000000 else 1
        end
    """,
    # ISO 4217 has a code for no currency.
    """
    create or replace macro currency_code(currency) as coalesce(nullif(currency, ''), 'XXX')
    """,
    # Labels are renamed, ids are not. The same rule for usage and events, models and restatements.
    """
    create or replace macro credential_id(api_key_id, login_username, label) as case
        when api_key_id is not null then 'key:' || api_key_id
        when login_username is not null then 'user:' || login_username
        when label is null or label in ('', 'None') then 'none'
        else 'label:' || label
    end
    """,
)


class DuckDBWarehouse:
    """See `faletl.warehouse.protocol.Warehouse`."""

    dialect = "duckdb"

    def __init__(self, settings: Settings, url: sa.URL) -> None:
        if not url.database or url.database.startswith(":"):
            raise SettingsError("FALETL_WAREHOUSE: a DuckDB warehouse needs a file, duckdb:///path")
        self._settings = settings
        self._is_looked_at = False  # whether its tables are ours as we made them: asked once
        named = Path(url.database)
        self._path = _behind_links(named)
        self._published = _behind_links(
            Path(settings.publish) if settings.publish else named.with_name("spend.duckdb")
        )
        if self._published.resolve() == self._path.resolve():
            raise SettingsError("FALETL_PUBLISH: the published copy cannot be the warehouse itself")
        for variable, path in (("FALETL_WAREHOUSE", self._path), ("FALETL_PUBLISH", self._published)):
            if os.path.isdir(path):  # noqa: PTH112  # unlike that of Path, it never raises
                raise SettingsError(f"{variable}: {path} is a folder; name a file")

    @contextmanager
    def lease(self, holder: str) -> Iterator[Lease]:
        """Become the only writer; see the protocol."""
        with self._lock(holder, self._settings.lock_seconds), _private():
            if not self._is_there():
                self._create()
            self._refuse_hard_links()
            if not self._is_looked_at:
                self._clear_up()
            with self._up_to_date() as connection:
                with connection.begin():
                    if not self._is_looked_at:
                        schema.refuse_altered(connection, str(self._path))
                    token = schema.take_token(connection, holder)
                self._is_looked_at = True
                yield Lease(connection, token)

    @contextmanager
    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> Iterator[sa.Connection | None]:
        """What is loaded now; see the protocol."""
        if not self._is_there():
            yield None
            return
        with (
            self._lock("a reader", self._settings.lock_seconds if wait else 0),
            self._up_to_date(read_only=True, is_older_fine=is_older_fine) as connection,
        ):
            yield connection

    @contextmanager
    def published(self) -> Iterator[sa.Connection | None]:
        """The copy for readers; it can neither be changed nor reach any other file."""
        with self._confined() as connection:
            if connection is not None:
                sa.event.listen(connection, "before_cursor_execute", _refuse_all_but_selects)
            yield connection

    def require_reader(self) -> None:
        """Nothing: the published copy is opened so that no query can leave it."""

    def export(self, query: str, path: Path) -> bool:
        """Write the rows of a reader's query to a Parquet file; see the protocol."""
        with self._confined(path) as connection:
            if connection is not None:
                _refuse_all_but_selects(connection, None, query)
                connection.exec_driver_sql(
                    f"copy (\n{query.rstrip().rstrip(';')}\n) to {quoted(path)} (format parquet)",
                    execution_options=AS_TYPED,
                )
        return connection is not None

    @contextmanager
    def _confined(self, writable: Path | None = None) -> Iterator[sa.Connection | None]:
        """The published copy; of all other files the connection reaches at most the writable one."""
        if not self._published.exists():
            yield None
            return
        with _private(), duck.room_to_spill() as scratch:
            connection = _connect(self._published, self._settings, scratch, read_only=True)
            try:
                if writable is not None:
                    connection.exec_driver_sql(f"set allowed_paths = [{quoted(writable)}]")
                connection.exec_driver_sql("set enable_external_access = false")
                connection.exec_driver_sql("set lock_configuration = true")
                yield connection
            finally:
                connection.close()

    @contextmanager
    def renewed(
        self, holder: str, token: int, ask: Callable[[sa.Connection], T]
    ) -> Iterator[tuple[Warehouse, T | None]]:
        """Make a new file beside the old one and rename it over that; see the protocol."""
        with self._lock(holder, self._settings.lock_seconds), _private():
            last_token, answer = self._asked_before_it_goes(ask)
            token = max(token, last_token)
            part = self._beside("rebuild")
            url = sa.URL.create("duckdb", database=str(part))
            fresh = DuckDBWarehouse(self._settings.model_copy(update={"publish": None}), url)
            try:
                _discard(part)
                fresh._create(token)
                yield fresh, answer
                with fresh._opened() as connection:
                    _checkpoint(connection, part)
                self._put_in_place(part)
            finally:
                _discard(part)

    def _asked_before_it_goes(self, ask: Callable[[sa.Connection], T]) -> tuple[int, T | None]:
        """The newest token of the file and what it answers, as far as it can be read.

        A file that can be read is whole without its .wal afterwards; of one that cannot a copy is kept.
        Raises SettingsError for a foreign database.
        """
        token = 0
        if not self._is_there():
            return token, None
        try:
            with self._opened() as connection:
                schema.is_older(connection, str(self._path), is_older_fine=True)
                if theirs := ownership.of_others(connection):
                    raise SettingsError(
                        f"{self._path} holds {', '.join(theirs)} of somebody else, and would lose them; "
                        "nothing was changed. Move them to a file of their own, which may attach "
                        f"{self._published}, and run faletl rebuild"
                    )
                token = int(connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one())
                answer = ask(connection)
                connection.commit()
                _checkpoint(connection, self._path)
                return token, answer
        except (TamperedError, WarehouseError) as error:
            if isinstance(error, WarehouseBusyError):
                raise
            aside = self._path.with_name(f"{self._path.name}.damaged")
            log.warning("%s; it is kept as %s", error, aside)
            try:
                copy_file(self._path, aside)
            except OSError as refused:
                raise self._refused("keep a copy of", refused) from None
            return token, None

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the macros; see the protocol."""
        for macro in MACROS:
            connection.exec_driver_sql(macro)

    def take_in(self, connection: sa.Connection, table: sa.Table, source: str, scratch: Path) -> None:
        """Insert staged rows; see the protocol."""
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        connection.exec_driver_sql(
            f"insert into {table.fullname} ({names}) select {names} from {source}"
        )

    def hand_out(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Write rows to a Parquet file; see the protocol."""
        select = query.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        connection.exec_driver_sql(f"copy ({select}) to {quoted(path)} (format parquet)")

    def described(self, connection: sa.Connection, select: str) -> list[tuple[str, str]]:
        """Names and types of the columns of a select; see the protocol."""
        found = connection.exec_driver_sql(f"describe {select}")
        return [(name, kind) for name, kind, *_ in found]

    def make_view(self, connection: sa.Connection, name: str, select: str) -> None:
        """Create or replace a view; see the protocol."""
        connection.exec_driver_sql(f"create or replace view {name} as {select}")

    def make_table(self, connection: sa.Connection, name: str, select: str, by: str | None) -> None:
        """Create or replace an empty table; see the protocol. An index would slow every load down."""
        connection.exec_driver_sql(f"create or replace table {name} as {select} limit 0")

    def analyze(self, connection: sa.Connection, name: str) -> None:
        """Nothing: DuckDB knows its tables."""

    def grant(self, role: str) -> None:
        """Refuse: a file has no roles."""
        raise UsageError(
            f"a DuckDB warehouse has no roles; give readers the published copy {self._published}, "
            "which holds no way to change anything"
        )

    def publish(self, lease: Lease) -> str | None:
        """Copy the file to its readers' place: temporary name, flush, rename."""
        connection = lease.connection
        build = schema.build_to_publish(connection)
        if self._shown_build() == build:
            return None
        connection.execute(
            sa.update(BUILDS).where(BUILDS.c.build_id == build[0]).values(published_at=datetime.now(UTC))
        )
        connection.commit()
        connection.exec_driver_sql("checkpoint")
        # The database must be closed here: closing any other handle on its file would drop DuckDB's
        # own lock on it. The lock file still keeps other writers out.
        connection.close()
        part = self._published_part
        try:
            _make_readable(self._published.parent)
            copy_file(self._path, part)
            part.chmod(0o440)
            sync(part)
            part.replace(self._published)
            sync(self._published.parent)
        except OSError as error:
            left = free_space(self._published, _size(self._path))
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise StorageError(f"cannot publish {self._published}: {error.strerror} ({left})") from None
        return str(self._published)

    def _shown_build(self) -> tuple[str, int] | None:
        """The build that readers have; a copy of ours that is damaged counts as none."""
        try:
            with self.published() as shown:
                return schema.newest_build(shown) if shown is not None else None
        except (TamperedError, sa.exc.DBAPIError) as error:
            # What opens but has no builds is a database of somebody else, as is what never was one.
            if isinstance(error, sa.exc.DBAPIError) or not _is_duckdb(self._published):
                raise SettingsError(
                    f"FALETL_PUBLISH: {self._published} is not faletl's, which does not replace it"
                ) from None
        log.warning("the published copy %s is damaged; it is made anew", self._published)
        return None

    def _create(self, token: int = 0) -> None:
        """Make the file under another name first: a kill must not leave one that cannot be opened."""
        part = self._beside("new")
        if (stale := _wal_of(self._path)).exists():
            raise TamperedError(
                f"{stale} is there but {self._path} is not: restore the warehouse, or move the "
                ".wal file away to start a new one"
            )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _discard(part)
            with (
                duck.room_to_spill() as scratch,
                _closing(_connect(part, self._settings, scratch)) as connection,
            ):
                with connection.begin():
                    schema.create(connection, token)
                    self.define_functions(connection)
                _checkpoint(connection, part)
        except OSError as error:
            raise self._refused("create", error) from None
        else:
            self._put_in_place(part)
        finally:
            _discard(part)

    @contextmanager
    def _up_to_date(
        self, *, read_only: bool = False, is_older_fine: bool = False
    ) -> Iterator[sa.Connection]:
        """A connection to the warehouse, upgraded before if it is of an older faletl."""
        with self._opened(read_only=read_only) as connection:
            is_older = schema.is_older(connection, str(self._path), is_older_fine=is_older_fine)
            connection.commit()
            if is_older_fine or not is_older:
                yield connection
                return
        with _private():
            self._upgrade()
        with self._opened(read_only=read_only) as connection:
            yield connection

    def _upgrade(self) -> None:
        """Bring a copy of the file up to date and put it in its place: all of it or nothing."""
        with self._opened() as connection:
            _checkpoint(connection, self._path)
        part = self._beside("upgrade")
        try:
            _discard(part)
            copy_file(self._path, part)
            with (
                duck.room_to_spill() as scratch,
                _closing(_connect(part, self._settings, scratch)) as connection,
            ):
                with connection.begin():
                    schema.upgrade(connection, str(self._path))
                _checkpoint(connection, part)
        except OSError as error:
            raise self._refused("upgrade", error) from None
        else:
            self._put_in_place(part)
        finally:
            _discard(part)

    def _put_in_place(self, part: Path) -> None:
        """Make a whole file the warehouse, in one step that lasts."""
        try:
            part.chmod(0o600)
            sync(part)
            # It would not open with the .wal of the file before it, which is whole without, or damaged.
            _wal_of(self._path).unlink(missing_ok=True)
            part.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise self._refused("replace", error) from None

    def _beside(self, what: str) -> Path:
        """Where a file is made that is to take the place of this one."""
        return self._path.with_name(f".{self._path.name}.{what}")

    @property
    def _published_part(self) -> Path:
        """Where the next published copy is made."""
        return self._published.with_name(f".{self._published.name}.part")

    def _clear_up(self) -> None:
        """Delete what commands that were killed left, which may be as large as the warehouse."""
        with suppress(OSError):
            for left in (self._beside("rebuild"), self._beside("upgrade"), self._published_part):
                _discard(left)

    def _is_there(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:
            raise self._refused("look for", error) from None

    def _refuse_hard_links(self) -> None:
        """Raises SettingsError where the file has another name.

        Each name has a lock and a .wal of its own, and what takes the place of one is not the other.
        """
        if self._path.stat().st_nlink > 1:
            raise SettingsError(
                f"FALETL_WAREHOUSE: {self._path} has another name, a hard link, which would not be "
                "locked with it; delete that name, or make it a symbolic link"
            )

    def _refused(self, what: str, error: OSError) -> StorageError:
        """The error for a disk that does not let us do something with the file."""
        left = free_space(self._path, _size(self._path))
        return StorageError(
            f"cannot {what} {self._path}: {error.strerror} ({left})", file=str(self._path)
        )

    @contextmanager
    def _lock(self, holder: str, seconds: float) -> Iterator[None]:
        beside = self._path.with_name(f"{self._path.name}.lock")
        lock = filelock.FileLock(beside, mode=0o600, thread_local=False)
        told = self._path.with_name(f"{self._path.name}.holder")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=seconds, poll_interval=_POLL_SECONDS)
        except filelock.Timeout:
            raise WarehouseBusyError(
                f"the warehouse {self._path} is held by {_told(told)}; waited {seconds:.0f} s, "
                "try again later"
            ) from None
        except OSError as error:
            raise self._refused("lock", error) from None
        try:
            by = {
                "holder": holder,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": instant(datetime.now(UTC).replace(microsecond=0)),
            }
            with suppress(OSError), _private():  # it only tells others who holds the lock
                told.write_text(json.dumps(by), "utf-8")
            yield
        finally:
            with suppress(OSError):
                told.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def _opened(self, *, read_only: bool = False) -> Iterator[sa.Connection]:
        """A connection to the warehouse; waits while a foreign program has the file open."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(WarehouseBusyError),
            stop=tenacity.stop_after_delay(self._settings.lock_seconds),
            wait=tenacity.wait_fixed(_POLL_SECONDS),
            reraise=True,
        )
        with (
            duck.room_to_spill() as scratch,
            _closing(
                retrying(_connect, self._path, self._settings, scratch, read_only=read_only)
            ) as connection,
        ):
            yield connection


def _behind_links(path: Path) -> Path:
    """The file behind symbolic links, so that they stay links and all names of it have one lock."""
    real = Path(os.path.realpath(path))
    return path if real == Path(os.path.abspath(path)) else real  # noqa: PTH100  # it keeps links


def _connect(
    path: Path, settings: Settings, scratch: Path | None, *, read_only: bool = False
) -> sa.Connection:
    """Connect to a DuckDB file; what DuckDB says on opening becomes an error of ours."""
    engine = sa.create_engine(
        sa.URL.create("duckdb", database=str(path)),
        poolclass=sa.pool.NullPool,
        connect_args={
            "read_only": read_only,
            "config": {
                # More threads only get in each other's way over little.
                **({"threads": "1"} if _size(path) < _LITTLE else {}),
                **duck.config(settings.memory, scratch),
            },
        },
    )
    sa.event.listen(engine, "before_cursor_execute", _with_literals, retval=True)
    add_prefix(engine, settings.schema_prefix)
    sa.event.listen(engine, "handle_error", partial(_tell_apart, path))
    try:
        connection = engine.connect()
        connection.exec_driver_sql("set TimeZone = 'UTC'")
        connection.commit()
    except (sa.exc.DBAPIError, duckdb.Error) as error:
        raise _opening_error(path, error) from None
    return connection


def _checkpoint(connection: sa.Connection, path: Path) -> None:
    """Have all of the database in its file; on closing, DuckDB would not say that it could not."""
    connection.exec_driver_sql("checkpoint")
    connection.commit()
    if (wal := _wal_of(path)).exists() and _size(wal):
        raise StorageError(f"{path} is not whole without its .wal ({free_space(path)})")


@contextmanager
def _closing(connection: sa.Connection) -> Iterator[sa.Connection]:
    """Close the connection at the end; an error of the database becomes one of ours."""
    try:
        yield connection
    except sa.exc.DBAPIError as error:
        said = _said(error.orig)
        if isinstance(error.orig, (duckdb.BinderException, duckdb.CatalogException)):
            raise TamperedError(schema.UNFIT.format(said)) from None
        raise WarehouseError(f"the warehouse failed: {said}; nothing half-done was kept") from None
    finally:
        # After an error that DuckDB calls fatal even this fails; the error is on its way already.
        with suppress(FaletlError, sa.exc.DBAPIError):
            connection.close()


def _with_literals(
    connection: sa.Connection,
    _cursor: object,
    statement: str,
    parameters: Any,
    context: Any,
    is_many: bool,
) -> tuple[str, Any]:
    """Write values into the SQL, quoted by SQLAlchemy: for a bound one DuckDB imports all of pandas."""
    if is_many or not parameters or context.invoked_statement is None:
        return statement, parameters
    invoked = context.invoked_statement
    if isinstance(invoked, sa.TextClause):  # whose values may have been given apart from it
        own, given = invoked.compile().params, context.compiled_parameters[0]
        apart = {name: given[name] for name in own if own[name] is None}
        if any(isinstance(value, (list, tuple)) for value in apart.values()):
            return statement, parameters  # of unknown type; only what makes the tables asks so
        invoked = invoked.bindparams(**apart)
    literal = invoked.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    return str(literal), ()


# What the system says when it refuses, which is no fault of the file.
_REFUSALS = (
    "fsync failed",
    *(
        os.strerror(number)
        for number in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
            errno.EMFILE, errno.ENFILE, errno.ENOMEM,
        )
    ),
)  # fmt: skip

_DAMAGES = ("corrupt", "checksum")
"""What DuckDB says when it reads what it never wrote."""

_ANEW = "restore it, or let faletl rebuild make it anew from the landed pages"


def _tell_apart(path: Path, context: sa.engine.ExceptionContext) -> None:
    """Raise an error of ours where the disk refuses, memory is short, or the file is damaged."""
    error = context.original_exception
    if not isinstance(error, (duckdb.OperationalError, duckdb.FatalException)):
        return  # it is the statement that is wrong
    said = _said(error)
    if any(words in said for words in _REFUSALS):
        raise StorageError(
            f"the warehouse {path} cannot be used: {said} ({free_space(path)}); nothing half-done "
            "was kept",
            file=str(path),
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        raise ExhaustedError.of_engine("the warehouse", error)
    is_damage = any(words in said.lower() for words in _DAMAGES)
    if is_damage or isinstance(error, duckdb.SerializationException):
        raise TamperedError(f"{path} is damaged ({said}); {_ANEW}")


def _said(error: object) -> str:
    """The first line of what DuckDB says; of a database that it gave up, why it did."""
    text = str(error)
    _, _, why = text.partition('Original error: "')
    return next(iter((why.rstrip('"') or text).splitlines()), type(error).__name__)


def _opening_error(path: Path, error: Exception) -> WarehouseError | TamperedError:
    said = _said(getattr(error, "orig", error))
    if "could not set lock" in said.lower():
        return WarehouseBusyError(f"another program has {path} open ({said}); close it there")
    return TamperedError(f"{path} cannot be opened as a DuckDB warehouse ({said}); {_ANEW}")


def _refuse_all_but_selects(connection: sa.Connection, _cursor: object, query: str, *_: object) -> None:
    """Raises UsageError for whatever is no query.

    A read-only connection without access to files may still write to the database's own: by `copy`.
    """
    duck: duckdb.DuckDBPyConnection = connection.connection.driver_connection  # type: ignore[assignment]
    try:
        kinds = {statement.type for statement in duck.extract_statements(query)}
    except duckdb.Error as error:
        raise UsageError(f"the query was refused: {str(error).splitlines()[0]}") from None
    # `pivot` is a select of what it creates; nothing can be created in a file that is open for reading.
    if not kinds <= {duckdb.StatementType.SELECT, duckdb.StatementType.CREATE}:
        raise UsageError("the query was refused: it is not a select")


@contextmanager
def _private() -> Iterator[None]:
    """What is made meanwhile next to the file (.wal, spilled rows, copies) is for this user only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _make_readable(folder: Path) -> None:
    """Make the folder, and those above it, so that readers get to what they may read in it."""
    if not folder.exists():
        _make_readable(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def _discard(path: Path) -> None:
    """Delete a database that nobody uses, with all that stands beside it."""
    for leftover in path.parent.glob(f"{path.name}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _wal_of(path: Path) -> Path:
    """Where DuckDB keeps what is committed and not in the file yet."""
    return path.with_name(f"{path.name}.wal")


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _is_duckdb(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[8:] == b"DUCK"


def _told(path: Path) -> str:
    try:
        by: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return f"{by['holder']} (process {by['pid']} on {by['host']}, since {by['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
