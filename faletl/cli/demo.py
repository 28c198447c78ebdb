"""The demo: the last two months of an invented team, and the first answers from the tables.

It uses its own folder and ignores the environment, so that invented spend never reaches a real
warehouse. The files in the folder have the default names, so that other commands work there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import msgspec
import sqlalchemy as sa
from rich.console import Console

from faletl import duck, invented, pipeline
from faletl.cli.output import console, published, write_table
from faletl.config import Settings
from faletl.errors import UsageError
from faletl.files import storage_error
from faletl.landing.storage import write_durably
from faletl.line.report import Progress, Report
from faletl.operations.status import COVERAGE
from faletl.resources import PRICES
from faletl.sandbox import FULL_KEY, Sandbox, invented_world
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.tables import LOADS
from faletl.wire import UNREADABLE

_WAREHOUSE = "faletl.duckdb"
_OLDER_WAREHOUSE, _OLDER_OWNERS = "warehouse.duckdb", "owners.csv"


class _Demo(msgspec.Struct, frozen=True):
    """The mark in a demo's folder: its first day, and whether everything was loaded once."""

    first_day: date
    is_loaded: bool = False


def run(folder: Path, progress: Progress) -> tuple[Settings, Report]:
    """Load last month and this one into the folder; when called again, load what is due.

    Fal serves no history of its price list. To have price changes to show, the first call extracts it
    twice: as of the first day, and as of now. A call after an interruption continues.

    Raises:
        UsageError: the folder exists, is not empty, and is not a demo's.
        StorageError: the folder cannot be written.
    """
    demo = _opened(folder)
    then = datetime.combine(demo.first_day, time(), UTC)
    if not _has_prices(folder):
        snapshots = Asked(resources=("models", "prices"))
        settings, report = _load(folder, lambda: then, snapshots, progress)
        if report.exit_code:
            return settings, report
    selection = Asked() if demo.is_loaded else Asked(demo.first_day)
    settings, report = _load(folder, _now, selection, progress)
    if not report.exit_code and not demo.is_loaded:
        _write_mark(folder, _Demo(demo.first_day, is_loaded=True))
    return settings, report


def _now() -> datetime:
    return datetime.now(UTC)


def _load(
    folder: Path, served_at: Callable[[], datetime], selection: Asked, progress: Progress
) -> tuple[Settings, Report]:
    with Sandbox(invented_world(late=True, now=served_at)) as server:
        settings = _settings(folder, api_url=server.url)
        return settings, pipeline.run(settings, selection, progress)


def _settings(folder: Path, **options: object) -> Settings:
    return Settings.isolated(
        key=FULL_KEY,
        warehouse=f"duckdb:///{folder / _WAREHOUSE}",
        landing=str(folder / "landing"),
        first_days=0,  # the mark has the first day
        rate=0,
        **options,
    )


def _has_prices(folder: Path) -> bool:
    """Whether the first price list is loaded."""
    with open_warehouse(_settings(folder)).reading() as connection:
        if connection is None:
            return False
        prices = sa.exists().where(LOADS.c.resource == PRICES.name, LOADS.c.is_current)
        return bool(connection.execute(sa.select(prices)).scalar_one())


# --- The folder ----------------------------------------------------------------------------------


def _opened(folder: Path) -> _Demo:
    """Open or create the demo of the folder; raises UsageError for a folder in other use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} is not a folder; name another with --folder") from None
    except OSError as error:
        raise storage_error(error, folder) from None
    is_older = _OLDER_WAREHOUSE in names and _WAREHOUSE not in names
    if invented.DEMO_MARK in names:
        demo = _read_mark(folder)
    elif names - {f".{invented.DEMO_MARK}.part"} and not (is_older and _OLDER_OWNERS in names):
        raise _in_use(folder)
    else:
        first_of_month = _now().date().replace(day=1)
        start = (first_of_month - timedelta(days=1)).replace(day=1)
        demo = _Demo(_first_day_of_older(folder) or start if is_older else start)
        _write_mark(folder, demo)
    if is_older:
        _first_day_of_older(folder)
        _take_over_older(folder)
    return demo


def _in_use(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} has files that are not of a demo, and invented spend must not mix with them; name a "
        "new or empty folder with --folder"
    )


def _first_day_of_older(folder: Path) -> date | None:
    """Return the first day that an older faletl's demo loaded; raises UsageError if it is not a demo."""
    file = folder / _OLDER_WAREHOUSE
    try:
        with duckdb.connect(
            str(file), read_only=True, config=duck.config(Settings.isolated().memory, None)
        ) as connection:
            loads = connection.execute(
                "select account, min(case when resource = 'usage' then window_start end)::date "
                "from ops.loads group by account"
            ).fetchall()
    except duckdb.Error:
        raise _in_use(folder) from None
    if {account for account, _ in loads} != {invented.ACCOUNT}:
        raise _in_use(folder)
    first_day: date | None = loads[0][1]
    return first_day


def _take_over_older(folder: Path) -> None:
    """Rename the warehouse of an older demo; its .wal first, because the warehouse needs it."""
    try:
        for end in (".wal", ""):
            older = folder / f"{_OLDER_WAREHOUSE}{end}"
            if older.exists():
                older.rename(folder / f"{_WAREHOUSE}{end}")
        (folder / f"{_OLDER_WAREHOUSE}.lock").unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder / _WAREHOUSE) from None


def _read_mark(folder: Path) -> _Demo:
    path = folder / invented.DEMO_MARK
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Demo)
    except UNREADABLE:
        raise UsageError(f"{path} cannot be read; delete {folder} to start the demo again") from None
    except OSError as error:
        raise storage_error(error, path) from None


def _write_mark(folder: Path, demo: _Demo) -> None:
    write_durably(folder / invented.DEMO_MARK, msgspec.json.encode(demo))


# --- The first answers ----------------------------------------------------------------------------

_TOTAL = """
select currency, sum(cost_total) as cost_total, min(usage_date) as first_day, max(usage_date) as last_day
from reports.rpt_spend_daily group by currency order by currency
"""

_DAYS = """
select usage_date, sum(cost_total) as cost_total from reports.rpt_spend_daily
where currency = 'USD' group by usage_date order by usage_date desc limit 14
"""

ANSWERS = (
    (
        "Where does it go, and does the bill match the list price? The last 30 days.",
        """
        select
            endpoint_id as endpoint, unit, round(sum(quantity), 3) as quantity,
            round(sum(cost_total), 2) as cost_usd,
            round(quotient(sum(cost_subtotal), sum(quantity)), 6) as paid_per_unit,
            arg_max(list_unit_price, usage_date) as list_price,
            arg_max(list_unit, usage_date) as list_unit
        from reports.rpt_spend_daily
        where currency = 'USD'
            and usage_date > (select max(usage_date) from reports.rpt_spend_daily) - interval '30 days'
        group by endpoint_id, unit order by cost_usd desc limit 8
        """,
    ),
    (
        "Why is this month's bill not last month's?",
        """
        select
            endpoint_id as endpoint, unit, round(previous_cost_total, 2) as last_month,
            round(cost_total, 2) as this_month, round(cost_change, 2) as change,
            round(change_from_price, 2) as from_price, round(change_from_volume, 2) as from_volume,
            round(change_from_new_or_gone, 2) as new_or_gone
        from reports.rpt_spend_monthly
        where currency = 'USD'
            and usage_month = (select max(usage_month) from reports.rpt_spend_monthly)
        order by abs(cost_change) desc limit 6
        """,
    ),
    (
        "Which list prices changed, and how much spend is at stake?",
        """
        select
            endpoint_id as endpoint, previous_unit_price as old_price, previous_unit as old_unit,
            unit_price as new_price, unit as new_unit, round(change_ratio, 4) as ratio,
            round(spend_last_30_days, 2) as usd_last_30_days
        from reports.rpt_price_changes order by spend_last_30_days desc limit 6
        """,
    ),
    (
        "Whose keys spend it?",
        """
        select
            credential_label as credential, owner, team, cost_centre,
            round(sum(cost_total), 2) as cost_usd
        from reports.rpt_spend_by_credential where currency = 'USD'
        group by credential_label, owner, team, cost_centre order by cost_usd desc
        """,
    ),
    (
        "What does a success cost, and how much fails? The last 30 days.",
        """
        select
            endpoint_id as endpoint, sum(request_count) as requests,
            round(quotient(sum(cost_total), sum(success_count)), 4) as usd_per_success,
            round(100 * quotient(sum(user_error_count), sum(request_count)), 1) as user_error_percent,
            round(100 * quotient(sum(error_count), sum(request_count)), 1) as error_percent
        from reports.rpt_unit_economics
        where usage_date > (select max(usage_date) from reports.rpt_unit_economics) - interval '30 days'
        group by endpoint_id order by sum(cost_total) desc limit 6
        """,
    ),
    (
        "Did a single request cost far more than is usual?",
        """
        select
            strftime(requested_at, '%Y-%m-%d %H:%M') as requested_at, endpoint_id as endpoint,
            round(cost_total, 2) as cost_usd, round(usual_cost, 2) as usual, round(times_usual) as times
        from reports.rpt_runaway_requests order by rpt_runaway_requests.cost_total desc limit 6
        """,
    ),
    (
        "How long do the credits last?",
        """
        select
            balance_date, round(current_balance, 2) as balance, currency,
            round(burn_7_days, 2) as a_day_last_7, round(burn_30_days, 2) as a_day_last_30,
            round(days_left, 1) as days_left, empty_on
        from reports.rpt_credit_runway order by balance_date desc limit 1
        """,
    ),
)  # fmt: skip
"""Questions about a bill, each with its query. Amounts are rounded for display."""

TRY_NEXT = (
    "select usage_date, endpoint_id, quantity, unit, cost_total "
    "from reports.rpt_spend_daily order by cost_total desc limit 5"
)


def print_first_answers(settings: Settings) -> None:
    """Print total spend, spend per day, the answers to `ANSWERS`, and a command to try next."""
    terminal = console()
    with published(settings) as connection:
        for total in connection.exec_driver_sql(_TOTAL).mappings():
            days = f"from {total['first_day']} to {total['last_day']}"
            amount = f"[bold]{_money(total['cost_total'])} {total['currency']}[/bold]"
            terminal.print(f"\n{amount} {days}. {COVERAGE}\n")
        _print_days(terminal, connection.exec_driver_sql(_DAYS).mappings().all())
        for question, query in ANSWERS:
            terminal.print(f"\n[bold]{question}[/bold]")
            result = connection.exec_driver_sql(query)
            write_table(list(result.keys()), result)
        file = Path(str(connection.engine.url.database))
    command = "faletl" if shutil.which("faletl") else os.path.relpath(sys.argv[0], file.parent)
    terminal.print(f"\nDatabase for your tools: {file}. Try next:", soft_wrap=True)
    terminal.print(
        f'  cd {shlex.quote(str(file.parent))} && {command} sql "{TRY_NEXT}"',
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _print_days(terminal: Console, days: Sequence[sa.RowMapping]) -> None:
    most = max((day["cost_total"] for day in days), default=Decimal(0))
    width = 40
    for day in reversed(days):
        bar = "█" * int(day["cost_total"] * width / most) if most else ""
        terminal.print(f"{day['usage_date']}  {_money(day['cost_total']):>12}  {bar}", highlight=False)


def _money(amount: Decimal) -> str:
    return f"{amount:,.2f}"
