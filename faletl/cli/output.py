"""What people read in a terminal: query results, the state of the warehouse, what a run would do."""

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

if TYPE_CHECKING:  # the client, the model and what they need take a second to import, and status none
    from faletl.line.plan import Forecast
    from faletl.operations.check import Checked
    from faletl.operations.estimate import Estimates
    from faletl.operations.maintain import Freed
    from faletl.operations.validate import Verdict


Format = Literal["table", "csv", "json", "parquet"]

_MOST_ROWS = 1000  # of a table for people; the other formats hold all


# --- faletl sql -----------------------------------------------------------------------------------


def print_query(settings: Settings, query: str, form: Format) -> None:
    """Run one select on what is published and write its rows to stdout.

    Raises:
        UsageError: nothing is published yet, or the query is none; or it would have powers over the
            server of the database.
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
        said = str(error.orig).splitlines()[0]
        advice = _MULTIPLY if "Overflow in multiplication" in said else ""
        raise UsageError(f"the query was refused: {said}{advice}") from None
    except sa.exc.SQLAlchemyError as error:
        raise UsageError(f"the query was refused: {str(error).splitlines()[0]}") from None


_MULTIPLY = (
    "; multiply amounts with the macro times(a, b), which is exact to 12 decimals, or "
    "cast them to fewer decimals first: quantity::decimal(38,6)"
)

_UNPUBLISHED = "nothing is published yet; run faletl run first"


@contextmanager
def published(settings: Settings) -> Iterator[sa.Connection]:
    """What readers see; raises UsageError when there is nothing yet."""
    with open_warehouse(settings).published() as connection:
        if connection is None:
            raise UsageError(_UNPUBLISHED)
        yield connection


def write_table(names: Sequence[str], rows: sa.CursorResult[Any]) -> None:
    """Write rows for people, numbers to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = rows.fetchmany(_MOST_ROWS)
    for position, name in enumerate(names):
        is_number = any(isinstance(row[position], (int, Decimal)) for row in shown)
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in shown:
        table.add_row(*(Text(_shown(value)) for value in row))
    console().print(table)
    if rows.fetchone() is not None:
        sys.stderr.write(f"only the first {_MOST_ROWS:,} rows are shown; --format csv has all\n")


def _shown(value: object) -> str:
    """A value for people: amounts without trailing zeros, control characters made visible."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return plain(value)
    return _printable(value.isoformat(" ") if isinstance(value, datetime) else str(value))


def _printable(text: str) -> str:
    """The text with control characters, and others that nobody sees, made visible."""
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )


_FORMULA = re.compile(r"(?:^|(?<=;))(?= *[=+@-])")
"""Where a formula would begin."""


def _write_csv(names: Sequence[str], rows: sa.CursorResult[Any]) -> None:
    line = io.StringIO(newline="")
    writer = csv.writer(line)  # with \r\n behind each line, so that a cell with one of them is quoted
    for cells in chain([names], ([_csv_cell(value) for value in row] for row in rows)):
        writer.writerow(cells)
        sys.stdout.write(line.getvalue().removesuffix("\r\n") + "\n")
        line.seek(0)
        line.truncate()


def _csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula, also where it splits cells at semicolons."""
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
        if not line.isprintable():  # what is not, is in a text
            line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        sys.stdout.write(f"{',' if number else ''}\n{line}")
    sys.stdout.write("\n]\n")


_WRITERS = {"table": write_table, "csv": _write_csv, "json": _write_json}


# --- faletl status --------------------------------------------------------------------------------


def print_status(settings: Settings, *, as_json: bool) -> None:
    """Write what is loaded, how old it is and what failed; never waits for a run under way."""
    found = status(settings)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, default=str) + "\n")
        return
    if not found["resources"]:
        sys.stdout.write("Nothing is loaded yet; run faletl run.\n")
        return
    names = ("account", "resource", "newest window", "lag", "windows", "rows", "held", "quarantine",
             "open failures")  # fmt: skip
    lines = []
    for line in found["resources"]:
        lag = "" if line["lag_seconds"] is None else _span(line["lag_seconds"])
        lines.append(
            (line["account"], line["resource"], line["newest_window"] or "", lag,
             f"{line['windows']:,}", f"{line['rows']:,}", f"{line['held']:,}", f"{line['quarantine']:,}",
             str(line["open_failures"]))
        )  # fmt: skip
    _print_table(names, lines, left=4)
    for restated in found["restatements"]:
        sys.stdout.write(_restated_sentence(restated) + "\n")
    for alert in found["alerts"]:
        sys.stdout.write(
            f"{alert['kind']} since {alert['first_seen_at']}: {_shown(alert['subject'])} of "
            f"{_shown(alert['account'])}: {_shown(alert['detail'])}\n"
        )
    for sentence in _failure_sentences(found["failures"]):
        sys.stdout.write(sentence + "\n")
    if found["last_build"]:
        build = found["last_build"]
        sys.stdout.write(f"Last build {build['finished_at']}: {build['days']} days made anew, "
                         f"{build['checks']} checks.\n")  # fmt: skip
    if found["is_published_copy"]:
        sys.stdout.write("A run is writing now; this is the state that readers see.\n")
    sys.stdout.write(COVERAGE + "\n")


def _failure_sentences(failures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each failure; one for windows that failed alike, with the first and the last."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for failure in failures:
        told = failure["message"].partition(": ")[2]  # behind the place
        alike.setdefault((failure["account"], failure["error"], told), []).append(failure)
    for (*_, told), ones in alike.items():
        at = f"failed {ones[-1]['failed_at']}: "
        if len(ones) == 1:
            yield at + _shown(ones[0]["message"])
            continue
        ordered = sorted(ones, key=lambda one: one["window_start"])
        first, last = (f"{one['resource']} {one['window_start']}" for one in (ordered[0], ordered[-1]))
        yield f"{at}{len(ones)} windows, {first} to {last}: {_shown(told)}"


def _restated_sentence(restated: dict[str, Any]) -> str:
    return (
        f"Restated since their days closed: {restated['lines']:,} lines of {restated['resource']} on "
        f"{restated['windows']:,} days of {_shown(restated['account'])}, "
        f"{Decimal(restated['cost_total_change']):+,f} {restated['currency']} in all; last seen "
        f"{restated['last_seen_at']}."
    )


def _span(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    return f"{days} d {hours} h" if days else f"{hours} h {rest // 60} min"


# --- faletl accounts, faletl horizon --------------------------------------------------------------


def print_accounts(settings: Settings) -> None:
    """A line for each account; of keys only how many were seen."""
    from faletl.line.accounts import known_accounts

    loaded: dict[str, tuple[datetime, datetime]] = {}
    with open_warehouse(settings).reading() as connection:
        known = known_accounts(connection) if connection is not None else {}
        if connection is not None:
            loads = LOADS.c
            found = connection.execute(
                sa.select(
                    loads.account, sa.func.min(loads.window_start), sa.func.max(loads.window_start)
                )
                .where(loads.is_current)
                .group_by(loads.account)
            )
            loaded = {label: (first, last) for label, first, last in found}
    if not known:
        sys.stdout.write("there is no account yet; run faletl run first\n")
        return
    lines = []
    for label, one in sorted(known.items()):
        days = [str(at.astimezone(UTC).date()) for at in loaded.get(label, ())] or ["", ""]
        lines.append(
            (label, ", ".join(reversed(one.usernames)), f"{len(one.key_ids):,}",
             "sandbox" if one.is_sandbox else "fal", utc(one.bound_at) if one.bound_at else "",
             *days)
        )  # fmt: skip
    names = ("account", "usernames at fal", "keys", "of", "bound at", "first day", "last day")
    _print_table(names, lines, left=len(names))


def print_horizons(settings: Settings, resources: Collection[str], account: str | None) -> None:
    """The first day that runs keep complete: of all accounts and resources, or of those named."""
    from faletl.config import FINGERPRINT
    from faletl.warehouse.horizons import all_horizons

    with open_warehouse(settings).reading() as connection:
        found = list(all_horizons(connection)) if connection is not None else []
    lines = [
        ("(a key without an account yet)" if owner.startswith(FINGERPRINT) else owner, name, str(day))
        for owner, name, day in found
        if (not resources or name in resources) and account in (None, owner)
    ]
    if not lines:
        sys.stdout.write("nothing was asked for yet: the first run decides (FALETL_FIRST_DAYS)\n")
        return
    _print_table(("account", "resource", "from"), lines, left=3)


# --- Landed pages, and what a run would do --------------------------------------------------------


def print_landing(settings: Settings) -> None:
    """Reads and bytes per account folder and resource, and how many of them prune would drop."""
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
        held = sums.setdefault((folder.parents[2].name, folder.parents[1].name), [0] * 4)
        for position, more in enumerate((1, size, is_dropped, size * is_dropped)):
            held[position] += more
    if not sums:
        sys.stdout.write(f"nothing has landed in {settings.landing} yet\n")
        return
    names = ("account", "resource", "reads", "bytes", "prunable reads", "prunable bytes")
    _print_table(
        names, [(*key, *map("{:,}".format, held)) for key, held in sorted(sums.items())], left=2
    )
    sys.stdout.write(unknown)


def print_freed(freed: Sequence[Freed], *, is_dry: bool) -> None:
    """Rows, files and bytes of each kind that was deleted, or would be."""
    lines = [(one.kind, *map("{:,}".format, (one.rows, one.files, one.bytes))) for one in freed]
    _print_table(("would be deleted" if is_dry else "deleted", "rows", "files", "bytes"), lines, left=1)


def print_forecasts(settings: Settings, forecasts: Sequence[Forecast]) -> None:
    """Windows, calls and minutes per resource, and in all."""
    if not forecasts:
        sys.stdout.write("nothing to do: no window is due\n")
        return
    lines = []
    for one in forecasts:
        days = [str(window) for window in one.windows]
        told = days[0] if len(days) == 1 else f"{days[0]} … {days[-1]}"
        lines.append((one.resource, f"{len(days):,}", told, f"{one.calls:,}"))
    _print_table(("resource", "windows", "from … to", "calls"), lines, left=1)
    calls = sum(one.calls for one in forecasts)
    seconds = max(
        calls / settings.rate if settings.rate else 0, calls * SECONDS_A_CALL / settings.parallel
    )
    windows = sum(len(one.windows) for one in forecasts)
    sys.stdout.write(f"{windows:,} windows, about {calls:,} calls, {seconds / 60:.1f} minutes\n")
    if guesses := " and ".join(one.resource for one in forecasts if one.is_guess):
        sys.stdout.write(
            f"Calls for {guesses} are a guess: which endpoints there are is not known yet.\n"
        )


SECONDS_A_CALL = 0.5
"""What a call to fal is taken to last, where nothing is known of it."""


def _print_table(names: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> None:
    """A table of which the first `left` columns are texts, the others numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for position, name in enumerate(names):
        table.add_column(name, justify="left" if position < left else "right")
    for line in lines:
        table.add_row(*(Text(_shown(cell)) for cell in line))
    console().print(table)


# --- faletl validate, faletl quarantine -----------------------------------------------------------


def print_validations(verdict: Verdict) -> None:
    """Per resource: how many windows were looked at, and how many expectations failed."""
    if not verdict.judged:
        sys.stdout.write("nothing to validate: nothing of that is loaded\n")
        return
    severities = ("critical", "warning", "info")
    names = ("resource", "windows", "rows", "expectations", *severities)
    lines = []
    for name in RESOURCES:
        if mine := [one for one in verdict.judged if one.resource == name]:
            sums = (len(mine), sum(one.rows for one in mine), sum(len(o.validations) for o in mine))
            failed = [sum(one.failures(level) for one in mine) for level in severities]
            lines.append((name, *map("{:,}".format, (*sums, *failed))))
    _print_table(names, lines, left=1)


def print_quarantine(rows: Sequence[sa.RowMapping]) -> None:
    """A line for each row that was set aside."""
    if not rows:
        sys.stdout.write("no row is set aside\n")
        return
    names = ("read", "resource", "window", "page", "row", "endpoint", "reason", "resolved")
    lines = [
        (row["load_id"], row["resource"], str(row["window_start"].astimezone(UTC).date()),
         str(row["page"]), str(row["row"]), row["endpoint_id"] or "", row["reason"],
         utc(row["resolved_at"]) if row["resolved_at"] else "")
        for row in rows
    ]  # fmt: skip
    _print_table(names, lines, left=len(names))


def print_rows_set_aside(rows: Sequence[sa.RowMapping]) -> None:
    """Each row as fal sent it, with what is wrong and the folder of its page."""
    for row in rows:
        sys.stdout.write(
            f"{row['landing_path']}, page {row['page']} row {row['row']}: {_shown(row['reason'])}\n"
            f"{_shown(row['raw_json'])}\n"
        )


# --- faletl check ---------------------------------------------------------------------------------


def print_check(settings: Settings, checked: Checked) -> None:
    """The account, and per resource whether it can be read, with which key if there are two.

    Nothing is written where nothing was found out.
    """
    if all(one.is_readable is None and not one.exit_code for one in checked.findings):
        return
    if checked.account is not None:
        label = f", labelled {settings.account} (FALETL_ACCOUNT)" if settings.account else ""
        sys.stdout.write(f"Account: {_shown(checked.account)}{_shown(label)}\n")
    names = ["resource", "readable", "what to do"]
    lines = [[one.resource, _READABLE[one.is_readable], one.sentence] for one in checked.findings]
    if settings.metrics_key:
        names.insert(1, "key")
        for line, one in zip(lines, checked.findings, strict=True):
            line.insert(1, one.key_name)
    _print_table(names, lines, left=len(names))


_READABLE = {True: "yes", False: "no", None: "?"}


# --- faletl estimate ------------------------------------------------------------------------------


def print_estimates(estimates: Estimates, *, by_calls: bool) -> None:
    """A line per plan, or per unit that its endpoint was billed in; and what the figures stand on."""
    per = "call" if by_calls else "unit"
    names = ["endpoint", "unit billed", f"{per}s", "fal estimates", "currency", f"charged per {per}",
             f"for as many {per}s", "currency"]  # fmt: skip
    lines = []
    for one in estimates.found:
        unknown = "no history" if by_calls else "no price"
        figure = plain(one.total_cost) if one.total_cost else unknown
        said = [plain(one.planned.quantity), figure, one.currency if one.total_cost else ""]
        for number, charged in enumerate(one.charged or [None]):
            told = ("no history", "", "")
            if charged:
                told = (plain(charged.cost_per_unit), plain(charged.cost), charged.currency)
            unit = charged.unit if charged and charged.unit is not None else ""
            lines.append([one.planned.endpoint_id, unit, *(["", "", ""] if number else said), *told])
    if by_calls:
        for line in (names, *lines):
            del line[1]
    if lines:
        _print_table(names, lines, left=1 if by_calls else 2)
    history = estimates.history
    if history is None:
        sys.stdout.write("Nothing charged to this account is published yet; faletl run loads it.\n")
        return
    sys.stdout.write(
        f"Charged: account {_shown(history.account)}, {history.first_day} to {history.last_day}.\n"
    )


# --- Shared ---------------------------------------------------------------------------------------


def console() -> Console:
    """Where results are written to."""
    # Not narrower than a table needs when the output goes to a file or a pipe.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)
