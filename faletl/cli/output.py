"""Tables and sentences that the command line prints."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from faletl.config import Settings
from faletl.errors import UsageError
from faletl.files import scratch_folder
from faletl.money import plain
from faletl.operations.status import COVERAGE, status, utc
from faletl.resources import RESOURCES
from faletl.warehouse import open_warehouse
from faletl.warehouse.names import AS_TYPED
from faletl.warehouse.tables import LOADS

if TYPE_CHECKING:  # client and models take a second to import, and status needs neither
    from faletl.line.plan import Forecast
    from faletl.operations.check import CheckReport
    from faletl.operations.estimate import Estimates
    from faletl.operations.maintain import Freed
    from faletl.operations.validate import GateReport


Format = Literal["table", "csv", "json", "parquet"]

MAX_TABLE_ROWS = 1000  # of --format table; the other formats print all rows


# --- faletl sql -----------------------------------------------------------------------------------


def print_query(settings: Settings, query: str, form: Format) -> None:
    """Run one select on the published tables and write its rows to stdout.

    Raises:
        UsageError: nothing is published yet, the query is not a select, or its role has powers
            over the database server.
    """
    warehouse = open_warehouse(settings)
    warehouse.require_reader()
    try:
        if form == "parquet":
            if sys.stdout.isatty():
                raise UsageError("Parquet is not for a terminal; send it to a file: … > rows.parquet")
            with scratch_folder() as scratch:
                path = scratch / "rows.parquet"
                if not warehouse.export_query(query, path):
                    raise UsageError(_UNPUBLISHED)
                with path.open("rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
            return
        with published(settings) as connection:
            result = connection.exec_driver_sql(query, execution_options=AS_TYPED)
            if not result.returns_rows:
                raise UsageError("the query returns no rows; write one select")
            _WRITERS[form](list(result.keys()), result)
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).splitlines()[0]
        advice = _MULTIPLY if "Overflow in multiplication" in reason else ""
        raise UsageError(f"the query was refused: {reason}{advice}") from None
    except sa.exc.SQLAlchemyError as error:
        raise UsageError(f"the query was refused: {str(error).splitlines()[0]}") from None


_MULTIPLY = (
    "; multiply amounts with the macro times(a, b), which is exact to 12 decimals, or "
    "cast them to fewer decimals first: quantity::decimal(38,6)"
)

_UNPUBLISHED = "nothing is published yet; run faletl run first"


@contextmanager
def published(settings: Settings) -> Iterator[sa.Connection]:
    """Open what readers see; raises UsageError if nothing is published yet."""
    with open_warehouse(settings).published() as connection:
        if connection is None:
            raise UsageError(_UNPUBLISHED)
        yield connection


def write_table(names: Sequence[str], rows: sa.CursorResult[Any]) -> None:
    """Write rows as a table, numbers aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    first_rows = rows.fetchmany(MAX_TABLE_ROWS)
    for position, name in enumerate(names):
        is_number = any(isinstance(row[position], (int, Decimal)) for row in first_rows)
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in first_rows:
        table.add_row(*(Text(_cell_text(value)) for value in row))
    console().print(table)
    if rows.fetchone() is not None:
        sys.stderr.write(f"only the first {MAX_TABLE_ROWS:,} rows are shown; --format csv has all\n")


def _cell_text(value: object) -> str:
    """Return the text of a value: amounts without trailing zeros, control characters escaped."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return plain(value)
    return _printable(value.isoformat(" ") if isinstance(value, datetime) else str(value))


def _printable(text: str) -> str:
    """Escape control characters and other invisible characters of a text."""
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )


_FORMULA = re.compile(r"(?:^|(?<=;))(?= *[=+@-])")
"""A place where a spreadsheet would see a formula."""


def _write_csv(names: Sequence[str], rows: sa.CursorResult[Any]) -> None:
    line = io.StringIO(newline="")
    writer = csv.writer(line)  # ends lines with \r\n, so that a cell with either of them is quoted
    for cells in chain([names], ([_csv_cell(value) for value in row] for row in rows)):
        writer.writerow(cells)
        sys.stdout.write(line.getvalue().removesuffix("\r\n") + "\n")
        line.seek(0)
        line.truncate()


def _csv_cell(value: object) -> object:
    """Return a cell that no spreadsheet reads as a formula, even if it splits cells at semicolons."""
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, str):
        return _FORMULA.sub("'", _printable(value))
    return value.isoformat() if isinstance(value, datetime) else value


def _write_json(names: Sequence[str], rows: sa.CursorResult[Any]) -> None:
    if len(set(names)) < len(names):
        raise UsageError("two columns have the same name; JSON needs one for each: use `as`")
    encoder = msgspec.json.Encoder(decimal_format="number")  # all digits, never through a float
    sys.stdout.write("[")
    for number, row in enumerate(rows):
        line = encoder.encode(dict(zip(names, row, strict=True))).decode()
        if not line.isprintable():  # a string value contains such a character
            line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        sys.stdout.write(f"{',' if number else ''}\n{line}")
    sys.stdout.write("\n]\n")


_WRITERS = {"table": write_table, "csv": _write_csv, "json": _write_json}


# --- faletl status --------------------------------------------------------------------------------


def print_status(settings: Settings, *, as_json: bool) -> None:
    """Print what is loaded, how old it is and what failed; never wait for a running command."""
    state = status(settings)
    if as_json:
        sys.stdout.write(json.dumps(state, indent=1, default=str) + "\n")
        return
    if not state["resources"]:
        sys.stdout.write("Nothing is loaded yet; run faletl run.\n")
        return
    names = ("account", "resource", "newest window", "lag", "windows", "rows", "held", "quarantine",
             "open failures")  # fmt: skip
    table_rows = []
    for resource in state["resources"]:
        lag = "" if resource["lag_seconds"] is None else _span(resource["lag_seconds"])
        table_rows.append(
            (resource["account"], resource["resource"], resource["newest_window"] or "", lag,
             *(f"{resource[count]:,}" for count in ("windows", "rows", "held", "quarantine")),
             str(resource["open_failures"]))
        )  # fmt: skip
    _print_table(names, table_rows, left=4)
    for restated in state["restatements"]:
        sys.stdout.write(_restated_sentence(restated) + "\n")
    for alert in state["alerts"]:
        sys.stdout.write(
            f"{alert['kind']} since {alert['first_seen_at']}: {_cell_text(alert['subject'])} of "
            f"{_cell_text(alert['account'])}: {_cell_text(alert['detail'])}\n"
        )
    for sentence in _failure_sentences(state["failures"]):
        sys.stdout.write(sentence + "\n")
    if state["last_build"]:
        build = state["last_build"]
        sys.stdout.write(f"Last build {build['finished_at']}: {build['days']} days built, "
                         f"{build['checks']} checks.\n")  # fmt: skip
    if state["is_published_copy"]:
        sys.stdout.write("A run is writing now; this is the state that readers see.\n")
    sys.stdout.write(COVERAGE + "\n")


def _failure_sentences(failures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each failure; windows that failed alike share one, with the first and last."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for failure in failures:
        reason = failure["message"].partition(": ")[2]  # without the window that it begins with
        groups.setdefault((failure["account"], failure["error"], reason), []).append(failure)
    for (*_, reason), group in groups.items():
        prefix = f"failed {group[-1]['failed_at']}: "
        if len(group) == 1:
            yield prefix + _cell_text(group[0]["message"])
            continue
        ordered = sorted(group, key=lambda failure: failure["window_start"])
        first, last = (
            f"{failure['resource']} {failure['window_start']}" for failure in (ordered[0], ordered[-1])
        )
        yield f"{prefix}{len(group)} windows, {first} to {last}: {_cell_text(reason)}"


def _restated_sentence(restated: dict[str, Any]) -> str:
    return (
        f"Restated since their days closed: {restated['lines']:,} lines of {restated['resource']} on "
        f"{restated['windows']:,} days of {_cell_text(restated['account'])}, "
        f"{Decimal(restated['cost_total_change']):+,f} {restated['currency']} in all; last seen "
        f"{restated['last_seen_at']}."
    )


def _span(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    return f"{days} d {hours} h" if days else f"{hours} h {rest // 60} min"


# --- faletl accounts, faletl horizon --------------------------------------------------------------


def print_accounts(settings: Settings) -> None:
    """Print a line for each account, with the number of keys seen but not the keys."""
    from faletl.line.accounts import known_accounts

    loaded: dict[str, tuple[datetime, datetime]] = {}
    with open_warehouse(settings).reading() as connection:
        known = known_accounts(connection) if connection is not None else {}
        if connection is not None:
            loads = LOADS.c
            rows = connection.execute(
                sa.select(
                    loads.account, sa.func.min(loads.window_start), sa.func.max(loads.window_start)
                )
                .where(loads.is_current)
                .group_by(loads.account)
            )
            loaded = {label: (first, last) for label, first, last in rows}
    if not known:
        sys.stdout.write("there is no account yet; run faletl run first\n")
        return
    table_rows = []
    for label, account in sorted(known.items()):
        days = [str(at.astimezone(UTC).date()) for at in loaded.get(label, ())] or ["", ""]
        table_rows.append(
            (label, ", ".join(reversed(account.usernames)), f"{len(account.key_ids):,}",
             "sandbox" if account.is_sandbox else "fal",
             utc(account.bound_at) if account.bound_at else "", *days)
        )  # fmt: skip
    names = ("account", "usernames at fal", "keys", "of", "bound at", "first day", "last day")
    _print_table(names, table_rows, left=len(names))


def print_horizons(settings: Settings, resources: Collection[str], account: str | None) -> None:
    """Print the first day that runs keep complete, of all accounts and resources or the named ones."""
    from faletl.config import FINGERPRINT
    from faletl.warehouse.horizons import all_horizons

    with open_warehouse(settings).reading() as connection:
        horizons = list(all_horizons(connection)) if connection is not None else []
    table_rows = [
        ("(a key without an account yet)" if owner.startswith(FINGERPRINT) else owner, name, str(day))
        for owner, name, day in horizons
        if (not resources or name in resources) and account in (None, owner)
    ]
    if not table_rows:
        sys.stdout.write("there is no horizon yet: the first run sets it (FALETL_FIRST_DAYS)\n")
        return
    _print_table(("account", "resource", "from"), table_rows, left=3)


# --- Landed pages, and what a run would do --------------------------------------------------------


def print_landing(settings: Settings) -> None:
    """Print extracts and bytes per account folder and resource, and how many prune would delete."""
    from faletl.landing import extracts
    from faletl.operations.rebuild import prune

    dropped, unknown = set[Path](), ""
    try:
        dropped = set(prune(settings, is_dry=True)[0])
    except UsageError as error:
        unknown = f"{error}\n"
    sums: dict[tuple[str, str], list[int]] = {}
    for folder in extracts.all_reads(settings):
        size, is_dropped = extracts.size(folder), folder in dropped
        figures = sums.setdefault((folder.parents[2].name, folder.parents[1].name), [0] * 4)
        for position, amount in enumerate((1, size, is_dropped, size * is_dropped)):
            figures[position] += amount
    if not sums:
        sys.stdout.write(f"nothing has landed in {settings.landing} yet\n")
        return
    names = ("account", "resource", "extracts", "bytes", "prunable extracts", "prunable bytes")
    _print_table(
        names, [(*key, *map("{:,}".format, figures)) for key, figures in sorted(sums.items())], left=2
    )
    sys.stdout.write(unknown)


def print_freed(freed: Sequence[Freed], *, is_dry: bool) -> None:
    """Print rows, files and bytes of each kind that was deleted, or would be."""
    lines = [
        (deleted.kind, *map("{:,}".format, (deleted.rows, deleted.files, deleted.bytes)))
        for deleted in freed
    ]
    _print_table(("would be deleted" if is_dry else "deleted", "rows", "files", "bytes"), lines, left=1)


def print_forecasts(settings: Settings, forecasts: Sequence[Forecast]) -> None:
    """Print windows, calls and minutes per resource, and in total."""
    if not forecasts:
        sys.stdout.write("nothing to do: no window is due\n")
        return
    lines = []
    for forecast in forecasts:
        days = [str(window) for window in forecast.windows]
        span = days[0] if len(days) == 1 else f"{days[0]} … {days[-1]}"
        lines.append((forecast.resource, f"{len(days):,}", span, f"{forecast.calls:,}"))
    _print_table(("resource", "windows", "from … to", "calls"), lines, left=1)
    calls = sum(forecast.calls for forecast in forecasts)
    seconds = max(
        calls / settings.rate if settings.rate else 0, calls * SECONDS_A_CALL / settings.parallel
    )
    windows = sum(len(forecast.windows) for forecast in forecasts)
    sys.stdout.write(f"{windows:,} windows, about {calls:,} calls, {seconds / 60:.1f} minutes\n")
    if guesses := " and ".join(forecast.resource for forecast in forecasts if forecast.is_guess):
        sys.stdout.write(f"Calls for {guesses} are a guess: the number of endpoints is not known yet.\n")


SECONDS_A_CALL = 0.5
"""Assumed duration of a call to fal."""


def _print_table(names: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> None:
    """Print a table whose first `left` columns are texts and the others numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for position, name in enumerate(names):
        table.add_column(name, justify="left" if position < left else "right")
    for line in lines:
        table.add_row(*(Text(_cell_text(cell)) for cell in line))
    console().print(table)


# --- faletl validate, faletl quarantine -----------------------------------------------------------


def print_validations(report: GateReport) -> None:
    """Print per resource how many windows were validated, and how many expectations failed."""
    if not report.judged:
        sys.stdout.write("nothing to validate: no such window is loaded\n")
        return
    severities = ("critical", "warning", "info")
    names = ("resource", "windows", "rows", "expectations", *severities)
    lines = []
    for name in RESOURCES:
        if windows := [window for window in report.judged if window.resource == name]:
            rows = sum(window.rows for window in windows)
            sums = (len(windows), rows, sum(len(window.validations) for window in windows))
            failed = [sum(window.failures(level) for window in windows) for level in severities]
            lines.append((name, *map("{:,}".format, (*sums, *failed))))
    _print_table(names, lines, left=1)


def print_quarantine(rows: Sequence[sa.RowMapping]) -> None:
    """Print a line for each quarantined row."""
    if not rows:
        sys.stdout.write("no row is quarantined\n")
        return
    names = ("extract", "resource", "window", "page", "row", "endpoint", "reason", "resolved")
    lines = [
        (row["load_id"], row["resource"], str(row["window_start"].astimezone(UTC).date()),
         str(row["page"]), str(row["row"]), row["endpoint_id"] or "", row["reason"],
         utc(row["resolved_at"]) if row["resolved_at"] else "")
        for row in rows
    ]  # fmt: skip
    _print_table(names, lines, left=len(names))


def print_quarantined_rows(rows: Sequence[sa.RowMapping]) -> None:
    """Print each row as fal sent it, with what is wrong and the folder of its page."""
    for row in rows:
        sys.stdout.write(
            f"{row['landing_path']}, page {row['page']} row {row['row']}: {_cell_text(row['reason'])}\n"
            f"{_cell_text(row['raw_json'])}\n"
        )


# --- faletl check ---------------------------------------------------------------------------------


def print_check(settings: Settings, report: CheckReport) -> None:
    """Print the account, and per resource whether it can be read (and the key, if there are two).

    Print nothing if the check learned nothing.
    """
    if all(access.is_readable is None and not access.exit_code for access in report.findings):
        return
    if report.account is not None:
        label = f", labelled {settings.account} (FALETL_ACCOUNT)" if settings.account else ""
        sys.stdout.write(f"Account: {_cell_text(report.account)}{_cell_text(label)}\n")
    names = ["resource", "readable", "what to do"]
    lines = [
        [access.resource, _READABLE[access.is_readable], access.sentence] for access in report.findings
    ]
    if settings.metrics_key:
        names.insert(1, "key")
        for line, access in zip(lines, report.findings, strict=True):
            line.insert(1, access.key_name)
    _print_table(names, lines, left=len(names))


_READABLE = {True: "yes", False: "no", None: "?"}


# --- faletl estimate ------------------------------------------------------------------------------


def print_estimates(estimates: Estimates, *, by_calls: bool) -> None:
    """Print a line per plan and billed unit of its endpoint; and the days that the charges are from."""
    per = "call" if by_calls else "unit"
    names = ["endpoint", "unit billed", f"{per}s", "fal estimates", "currency", f"charged per {per}",
             f"for as many {per}s", "currency"]  # fmt: skip
    lines = []
    for estimate in estimates.found:
        unknown = "no history" if by_calls else "no price"
        figure = plain(estimate.total_cost) if estimate.total_cost else unknown
        currency = estimate.currency if estimate.total_cost else ""
        figures = [plain(estimate.planned.quantity), figure, currency]
        for position, charged in enumerate(estimate.charged or [None]):
            past = ("no history", "", "")
            if charged:
                past = (plain(charged.cost_per_unit), plain(charged.cost), charged.currency)
            unit = charged.unit if charged and charged.unit is not None else ""
            lines.append(
                [estimate.planned.endpoint_id, unit, *(["", "", ""] if position else figures), *past]
            )
    if by_calls:
        for line in (names, *lines):
            del line[1]
    if lines:
        _print_table(names, lines, left=1 if by_calls else 2)
    history = estimates.history
    if history is None:
        sys.stdout.write("No charges of this account are published yet; run faletl run to load them.\n")
        return
    sys.stdout.write(
        f"Charged: account {_cell_text(history.account)}, {history.first_day} to {history.last_day}.\n"
    )


# --- Shared ---------------------------------------------------------------------------------------


def console() -> Console:
    """The console that results are written to."""
    # Wide enough for a table when the output goes to a file or a pipe.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
