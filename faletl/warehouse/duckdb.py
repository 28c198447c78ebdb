"""DuckDB: the warehouse as one file, readers on a copy of it.

One process writes at a time. A lock file next to the database makes other processes wait and names its
holder; the operating system frees the lock when the holder dies. A lease lasts from opening the file to
closing it.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import re
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

_SMALL_FILE_BYTES = 128 * 2**20  # an hourly run after a year of days costs a fifth less CPU

# Exact to 12 decimals, half away from zero; DECIMAL / DECIMAL would be a DOUBLE in DuckDB, and a product
# of two amounts overflows from 10^14 on. So amounts become whole numbers of 10^-12, which are multiplied
# and divided by hand, a few decimals at a time, so that no step overflows. Larger results are NULL, and
# fail no build; the functions of PostgreSQL have the same bounds. A division by zero is NULL in DuckDB,
# too; a `case` for it would compute these terms a second time.
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
    # One step of a long multiplication and division: `rest` is the remainder of the digits before.
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
    # The UTC time of an instant, without time zone tables, which are slow.
    """
    create or replace macro utc(instant) as make_timestamp(epoch_us(instant))
    """,
    # A number in front of a unit is a factor: `30 frames`, `1,000 tokens`, `1m tokens`. Only for
    # characters and tokens, k and m mean thousands and millions: `2k images` are images in 2K size.
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
    # Labels are renamed, ids are not. Usage, events, models and restatements share this rule.
    """
    create or replace macro credential_id(api_key_id, login_username, label) as case
        when api_key_id is not null then 'key:' || api_key_id
        when login_username is not null then 'user:' || login_username
        when label is null or label in ('', 'None') then 'none'
        else 'label:' || label
    end
    """,
)

_FUNCTIONS = frozenset(re.findall(r"macro (\w+)", "".join(MACROS)))


class DuckDBWarehouse:
    """See `faletl.warehouse.protocol.Warehouse`."""

    dialect = "duckdb"

    def __init__(self, settings: Settings, url: sa.URL) -> None:
        if not url.database or url.database.startswith(":"):
            raise SettingsError("FALETL_WAREHOUSE: a DuckDB warehouse needs a file, duckdb:///path")
        self._settings = settings
        self._is_checked = False  # whether the tables were compared with their definitions: done once
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
            if not self._is_checked:
                self._clear_up()
            with self._up_to_date() as connection:
                with connection.begin():
                    if not self._is_checked:
                        schema.refuse_altered(connection, str(self._path))
                    token = schema.take_token(connection, holder)
                self._is_checked = True
                yield Lease(connection, token)

    @contextmanager
    def reading(
        self, *, wait: bool = True, is_older_fine: bool = False
    ) -> Iterator[sa.Connection | None]:
        """Connect to read the loaded data; see the protocol."""
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
        """Connect to the published copy, which cannot be changed, and cannot reach other files."""
        with self._confined() as connection:
            if connection is not None:
                sa.event.listen(connection, "before_cursor_execute", _refuse_all_but_selects)
            yield connection

    def require_reader(self) -> None:
        """Do nothing: the published copy is opened so that no query can leave it."""

    def export_query(self, query: str, path: Path) -> bool:
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
        """Connect to the published copy; of other files, only the writable one can be reached."""
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
    def rebuilding(
        self, holder: str, token: int, ask: Callable[[sa.Connection], T]
    ) -> Iterator[tuple[Warehouse, T | None]]:
        """Make a new file next to the old one and rename it over that; see the protocol."""
        with self._lock(holder, self._settings.lock_seconds), _private():
            last_token, answer = self._ask_old_file(ask)
            token = max(token, last_token)
            part = self._temporary("rebuild")
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

    def _ask_old_file(self, ask: Callable[[sa.Connection], T]) -> tuple[int, T | None]:
        """Return the newest token of the file and the result of `ask`, as far as the file can be read.

        Afterwards a readable file is complete without its .wal; an unreadable one is copied.
        Raises SettingsError for a foreign database.
        """
        token = 0
        if not self._is_there():
            return token, None
        try:
            with self._opened() as connection:
                schema.is_older(connection, str(self._path), is_older_fine=True)
                if foreign := ownership.of_others(connection, _FUNCTIONS):
                    raise SettingsError(
                        f"{self._path} has foreign objects, which a rebuild would delete: "
                        f"{', '.join(foreign)}; nothing was changed. Move them to a file of their "
                        f"own, which may attach {self._published}, and run faletl rebuild"
                    )
                token = int(connection.execute(sa.select(WAREHOUSE.c.fencing_token)).scalar_one())
                answer = ask(connection)
                connection.commit()
                _checkpoint(connection, self._path)
                return token, answer
        except (TamperedError, WarehouseError) as error:
            if isinstance(error, WarehouseBusyError):
                raise
            damaged_copy = self._path.with_name(f"{self._path.name}.damaged")
            log.warning("%s; a copy of the file is kept as %s", error, damaged_copy)
            try:
                copy_file(self._path, damaged_copy)
            except OSError as copy_error:
                raise self._storage_error("keep a copy of", copy_error) from None
            return token, None

    def define_functions(self, connection: sa.Connection) -> None:
        """Create or replace the macros; see the protocol."""
        for macro in MACROS:
            connection.exec_driver_sql(macro)

    def load_rows(self, connection: sa.Connection, table: sa.Table, source: str, scratch: Path) -> None:
        """Insert staged rows; see the protocol."""
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        connection.exec_driver_sql(
            f"insert into {table.fullname} ({names}) select {names} from {source}"
        )

    def export_rows(self, connection: sa.Connection, query: sa.Select[Any], path: Path) -> None:
        """Write rows to a Parquet file; see the protocol."""
        select = query.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        connection.exec_driver_sql(f"copy ({select}) to {quoted(path)} (format parquet)")

    def column_types(self, connection: sa.Connection, select: str) -> list[tuple[str, str]]:
        """Return names and types of the columns of a select; see the protocol."""
        columns = connection.exec_driver_sql(f"describe {select}")
        return [(name, kind) for name, kind, *_ in columns]

    def make_view(self, connection: sa.Connection, name: str, select: str) -> None:
        """Create or replace a view; see the protocol."""
        connection.exec_driver_sql(f"create or replace view {name} as {select}")

    def make_table(self, connection: sa.Connection, name: str, select: str, by: str | None) -> None:
        """Create or replace an empty table; see the protocol. An index would slow every load down."""
        connection.exec_driver_sql(f"create or replace table {name} as {select} limit 0")

    def analyze(self, connection: sa.Connection, name: str) -> None:
        """Do nothing: DuckDB keeps statistics itself."""

    def grant(self, role: str) -> None:
        """Refuse: a file has no roles."""
        raise UsageError(
            f"a DuckDB warehouse has no roles; give readers the published copy {self._published}, "
            "which cannot be changed"
        )

    def publish(self, lease: Lease) -> str | None:
        """Copy the file to where readers open it: temporary name, flush, rename."""
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
            space = free_space(self._published, _size(self._path))
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise StorageError(f"cannot publish {self._published}: {error.strerror} ({space})") from None
        return str(self._published)

    def _shown_build(self) -> tuple[str, int] | None:
        """Return the build that readers see; None if our copy is missing or damaged."""
        try:
            with self.published() as shown:
                return schema.newest_build(shown) if shown is not None else None
        except (TamperedError, sa.exc.DBAPIError) as error:
            # A database without builds is foreign, and so is any file that is not a database.
            if isinstance(error, sa.exc.DBAPIError) or not _is_duckdb(self._published):
                raise SettingsError(
                    f"FALETL_PUBLISH: {self._published} was not made by faletl and is not replaced; set "
                    "FALETL_PUBLISH to another file"
                ) from None
        log.warning("the published copy %s is damaged; it is replaced", self._published)
        return None

    def _create(self, token: int = 0) -> None:
        """Create the file, first under another name: a kill must not leave an unusable file."""
        part = self._temporary("new")
        if (stale := _wal_of(self._path)).exists():
            raise TamperedError(
                f"{stale} exists but {self._path} does not: restore the warehouse, or move the "
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
            raise self._storage_error("create", error) from None
        else:
            self._put_in_place(part)
        finally:
            _discard(part)

    @contextmanager
    def _up_to_date(
        self, *, read_only: bool = False, is_older_fine: bool = False
    ) -> Iterator[sa.Connection]:
        """Connect to the warehouse; upgrade it first if it is of an older faletl."""
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
        """Upgrade a copy of the file and put it in place: all or nothing."""
        with self._opened() as connection:
            _checkpoint(connection, self._path)
        part = self._temporary("upgrade")
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
            raise self._storage_error("upgrade", error) from None
        else:
            self._put_in_place(part)
        finally:
            _discard(part)

    def _put_in_place(self, part: Path) -> None:
        """Make a complete file the warehouse, in one durable step."""
        try:
            part.chmod(0o600)
            sync(part)
            # The new file would not open with the .wal of the old one, which no longer needs it.
            _wal_of(self._path).unlink(missing_ok=True)
            part.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise self._storage_error("replace", error) from None

    def _temporary(self, what: str) -> Path:
        """Return the path of a file that will replace this one."""
        return self._path.with_name(f".{self._path.name}.{what}")

    @property
    def _published_part(self) -> Path:
        """The path where the next published copy is made."""
        return self._published.with_name(f".{self._published.name}.part")

    def _clear_up(self) -> None:
        """Delete files that killed commands left; they may be as large as the warehouse."""
        with suppress(OSError):
            for leftover in (
                self._temporary("rebuild"),
                self._temporary("upgrade"),
                self._published_part,
            ):
                _discard(leftover)

    def _is_there(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:
            raise self._storage_error("look for", error) from None

    def _refuse_hard_links(self) -> None:
        """Raise SettingsError if the file has a second name.

        Each name has a lock and a .wal of its own, and a file that replaces one name does not replace
        the other.
        """
        if self._path.stat().st_nlink > 1:
            raise SettingsError(
                f"FALETL_WAREHOUSE: {self._path} has a second name (a hard link), which would not be "
                "locked with it; delete that name, or make it a symbolic link"
            )

    def _storage_error(self, operation: str, error: OSError) -> StorageError:
        """Return the error for a disk that refuses an operation on the file."""
        space = free_space(self._path, _size(self._path))
        return StorageError(
            f"cannot {operation} {self._path}: {error.strerror} ({space})", file=str(self._path)
        )

    @contextmanager
    def _lock(self, holder: str, seconds: float) -> Iterator[None]:
        lock_path = self._path.with_name(f"{self._path.name}.lock")
        lock = filelock.FileLock(lock_path, mode=0o600, thread_local=False)
        holder_path = self._path.with_name(f"{self._path.name}.holder")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=seconds, poll_interval=_POLL_SECONDS)
        except filelock.Timeout:
            raise WarehouseBusyError(
                f"the warehouse {self._path} is in use by {_read_lock_holder(holder_path)}; waited "
                f"{seconds:.0f} s, try again later"
            ) from None
        except OSError as error:
            raise self._storage_error("lock", error) from None
        try:
            owner = {
                "holder": holder,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": instant(datetime.now(UTC).replace(microsecond=0)),
            }
            with suppress(OSError), _private():  # it only names the holder to other processes
                holder_path.unlink(missing_ok=True)  # it may be a link to a file of another program
                with holder_path.open("x", encoding="utf-8") as file:
                    json.dump(owner, file)
            yield
        finally:
            with suppress(OSError):
                holder_path.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def _opened(self, *, read_only: bool = False) -> Iterator[sa.Connection]:
        """Connect to the warehouse; wait while another program has the file open."""
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
    """Resolve symbolic links, so that they stay links and all names of the file share one lock."""
    real = Path(os.path.realpath(path))
    return path if real == Path(os.path.abspath(path)) else real  # noqa: PTH100  # it keeps links


def _connect(
    path: Path, settings: Settings, scratch: Path | None, *, read_only: bool = False
) -> sa.Connection:
    """Connect to a DuckDB file; errors on opening become errors of faletl."""
    engine = sa.create_engine(
        sa.URL.create("duckdb", database=str(path)),
        poolclass=sa.pool.NullPool,
        connect_args={
            "read_only": read_only,
            "config": {
                # With little data, several threads only slow each other down.
                **({"threads": "1"} if _size(path) < _SMALL_FILE_BYTES else {}),
                **duck.config(settings.memory, scratch),
            },
        },
    )
    sa.event.listen(engine, "before_cursor_execute", _with_literals, retval=True)
    add_prefix(engine, settings.schema_prefix)
    sa.event.listen(engine, "handle_error", partial(_raise_typed, path))
    try:
        connection = engine.connect()
        connection.exec_driver_sql("set TimeZone = 'UTC'")
        connection.commit()
    except (sa.exc.DBAPIError, duckdb.Error) as error:
        raise _opening_error(path, error) from None
    return connection


def _checkpoint(connection: sa.Connection, path: Path) -> None:
    """Write the whole database to its file; on closing, DuckDB would not report a failure."""
    connection.exec_driver_sql("checkpoint")
    connection.commit()
    if (wal := _wal_of(path)).exists() and _size(wal):
        raise StorageError(
            f"{path} is incomplete without its .wal, which could not be merged ({free_space(path)})"
        )


@contextmanager
def _closing(connection: sa.Connection) -> Iterator[sa.Connection]:
    """Close the connection at the end; errors of the database become errors of faletl."""
    try:
        yield connection
    except sa.exc.DBAPIError as error:
        reason = _reason_of(error.orig)
        if isinstance(error.orig, (duckdb.BinderException, duckdb.CatalogException)):
            raise TamperedError(schema.UNFIT.format(reason)) from None
        raise WarehouseError(f"the warehouse failed: {reason}; no partial change was kept") from None
    finally:
        # After an error that DuckDB calls fatal, even this fails; that error is being raised already.
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
    """Write values into the SQL, quoted by SQLAlchemy: for a bound value, DuckDB imports pandas."""
    if is_many or not parameters or context.invoked_statement is None:
        return statement, parameters
    invoked = context.invoked_statement
    if isinstance(invoked, sa.TextClause):  # its values may be passed separately
        own, values = invoked.compile().params, context.compiled_parameters[0]
        separate = {name: values[name] for name in own if own[name] is None}
        if any(isinstance(value, (list, tuple)) for value in separate.values()):
            return statement, parameters  # of unknown type; only the creation of tables does that
        invoked = invoked.bindparams(**separate)
    literal = invoked.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    return str(literal), ()


# Messages of the operating system when it refuses; they do not mean that the file is damaged.
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
"""Words in DuckDB's messages about bytes that it never wrote."""

_CURE = "restore it, or run faletl rebuild to build it again from the landed pages"


def _raise_typed(path: Path, context: sa.engine.ExceptionContext) -> None:
    """Raise a typed error if the disk refuses, memory is short, or the file is damaged."""
    error = context.original_exception
    if not isinstance(error, (duckdb.OperationalError, duckdb.FatalException)):
        return  # the statement itself is wrong
    reason = _reason_of(error)
    if any(words in reason for words in _REFUSALS):
        raise StorageError(
            f"the warehouse {path} cannot be used: {reason} ({free_space(path)}); no partial "
            "change was kept",
            file=str(path),
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        raise ExhaustedError.of_engine("the warehouse", error)
    is_damage = any(words in reason.lower() for words in _DAMAGES)
    if is_damage or isinstance(error, duckdb.SerializationException):
        raise TamperedError(f"{path} is damaged ({reason}); {_CURE}")


def _reason_of(error: object) -> str:
    """Return the first line of DuckDB's message; for an invalidated database, the original error."""
    text = str(error)
    _, _, original = text.partition('Original error: "')
    return next(iter((original.rstrip('"') or text).splitlines()), type(error).__name__)


def _opening_error(path: Path, error: Exception) -> WarehouseError | TamperedError:
    reason = _reason_of(getattr(error, "orig", error))
    if "could not set lock" in reason.lower():
        return WarehouseBusyError(f"another program has {path} open ({reason}); close it there")
    return TamperedError(f"{path} cannot be opened as a DuckDB warehouse ({reason}); {_CURE}")


def _refuse_all_but_selects(connection: sa.Connection, _cursor: object, query: str, *_: object) -> None:
    """Raise UsageError for any statement that is not a query.

    A read-only connection without access to files may still write to the database's own: by `copy`.
    """
    driver: duckdb.DuckDBPyConnection = connection.connection.driver_connection  # type: ignore[assignment]
    try:
        kinds = {statement.type for statement in driver.extract_statements(query)}
    except duckdb.Error as error:
        raise UsageError(f"the query was refused: {str(error).splitlines()[0]}") from None
    # `pivot` is a select of what it creates; nothing can be created in a file that is open for reading.
    if not kinds <= {duckdb.StatementType.SELECT, duckdb.StatementType.CREATE}:
        raise UsageError("the query was refused: it is not a select")


@contextmanager
def _private() -> Iterator[None]:
    """Let only this user read files made meanwhile (.wal, spilled rows, copies)."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _make_readable(folder: Path) -> None:
    """Create the folder and its parents so that readers can reach the files in it."""
    if not folder.exists():
        _make_readable(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def _discard(path: Path) -> None:
    """Delete an unused database with all files next to it (.wal, scratch)."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _wal_of(path: Path) -> Path:
    """Return the path where DuckDB keeps commits that are not in the file yet."""
    return path.with_name(f"{path.name}.wal")


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _is_duckdb(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[8:] == b"DUCK"


def _read_lock_holder(path: Path) -> str:
    try:
        owner: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return f"{owner['holder']} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
