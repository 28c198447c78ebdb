"""The cost of an hourly run after many others: the same windows, with more and more history.

    python -m benchmarks.hourly --after 12 108 204 396
    python -m benchmarks.hourly --after 12 --days 10 365

There is a run for each hour of a moving clock, for an account with 20 lines in every hour; on each
third day one of them arrives a day late. The folder is kept after each number of runs in `--after`.
At the end, one more run is made in a copy of each, in turn: at noon, when only the open day is due.
With `--days` the very first run loads that many days. Measured are CPU, statements to the
warehouse, files and folders of the landing that Python opened, listed or changed, and how many of
these belong to windows that were not due. `copy_s` is the time for a copy of the published file,
which is as large as the warehouse. Everything runs in one process, including the server, which
gives the same answers every time.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import time_machine

from benchmarks.measure import ROUNDS, print_results
from faletl import pipeline
from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox
from faletl.sandbox.world import BillingEvent, UsageLine
from tests.touched import Watch, is_of
from tests.truth import Account, charges, line

FIRST = datetime(2026, 1, 5, 0, 30, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ENDPOINTS = tuple(f"bench/endpoint-{number:02d}" for number in range(20))
LATE = timedelta(hours=27)
"""Delay of a late line after its hour: its day has been extracted several times by then."""


class Busy(Account):
    """An account that uses every endpoint in every hour; on each third day one line arrives late."""

    def prices(self) -> dict[str, dict[str, Any]]:
        """Return a list price for every endpoint."""
        for endpoint_id in ENDPOINTS:
            self.list_price(endpoint_id, "0.025")
        return self.listed

    def usage(self, start: datetime, end: datetime) -> list[UsageLine]:
        """Return the lines of the hours that have arrived."""
        now, first = self.now(), start.replace(hour=0, minute=0)
        days = [lines_of((first + number * DAY).date()) for number in range((end - first).days + 1)]
        return [
            usage_line
            for lines in days
            for usage_line, arrives_at in lines
            if start <= usage_line.hour < end and arrives_at <= now
        ]

    def billing_events(self, start: datetime, end: datetime) -> list[BillingEvent]:
        """Return the charges of those lines."""
        lines = self.usage(start.replace(minute=0, second=0, microsecond=0), end)
        return [event for event in charges(lines) if start <= event.timestamp < end]

    def calls(self, start: datetime, end: datetime) -> Any:
        """Return the requests of those lines."""
        return Account(lines=self.usage(start, end)).calls(start, end)

    def endpoints_called(self) -> set[str]:
        """Return all endpoints, so that the server need not search for them."""
        return set(ENDPOINTS)


@lru_cache(maxsize=400)
def lines_of(day: date) -> list[tuple[UsageLine, datetime]]:
    """Return the lines of a day, each with the instant from which fal shows it."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    day_lines = []
    for hour in range(24):
        at = midnight + hour * HOUR
        for number, endpoint in enumerate(ENDPOINTS):
            is_late = day.toordinal() % 3 == 0 and (hour, number) == (20, 0)
            day_lines.append((line(at, endpoint, str(1 + (hour + number) % 7)), at + LATE * is_late))
    return day_lines


@dataclass
class Cost:
    """The cost of a run."""

    windows: int = 0
    cpu_s: float = 0
    statements: int = 0
    touched: int = 0
    not_due: int = 0
    copy_s: float = 0
    warehouse_mib: float = 0


def settings_of(url: str, folder: Path, days: int, *, gate: bool) -> Settings:
    """Return settings of a warehouse in the folder."""
    return Settings.isolated(
        key=FULL_KEY, api_url=url, warehouse=f"duckdb:///{folder / 'warehouse.duckdb'}",
        landing=str(folder / "landing"), first_days=days, rate=0, gate=gate,
    )  # fmt: skip


def measure_run(settings: Settings, watch: Watch) -> Cost:
    """Measure a plain `faletl run`."""
    cost = Cost()

    def count(*_: Any) -> None:
        cost.statements += 1

    watch.start()
    sa.event.listen(sa.Engine, "after_cursor_execute", count)
    began = time.process_time()
    report = pipeline.run(settings)
    cost.cpu_s = time.process_time() - began
    sa.event.remove(sa.Engine, "after_cursor_execute", count)
    touched = watch.stop()
    assert report.exit_code == 0, report.failures
    windows = {(outcome.resource, f"{outcome.window.day}") for outcome in report.outcomes}
    cost.windows, cost.touched = len(windows), len(touched)
    cost.not_due = sum(not is_of(path, windows) for path in touched)
    published = Path(settings.warehouse.removeprefix("duckdb:///")).with_name("spend.duckdb")
    began = time.process_time()
    shutil.copyfile(published, published.with_suffix(".copy"))
    cost.copy_s = time.process_time() - began
    cost.warehouse_mib = published.stat().st_size / 2**20
    return cost


def grow(
    root: Path, days: int, after: list[int], url: str, watch: Watch, clock: Any, *, gate: bool
) -> None:
    """Make a history of `days` days with hourly runs; keep its folder after each number in `after`."""
    folder = root / "grown"
    folder.mkdir()
    for number in range(max(after)):
        clock.move_to(FIRST + number * HOUR, tick=False)
        cost = measure_run(settings_of(url, folder, days, gate=gate), watch)
        print(f"{days} days, run {number}: {cost}", file=sys.stderr, flush=True)
        if number + 1 in after:
            shutil.copytree(folder, root / f"{number + 1}")


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[12, 396], help="number of earlier runs")
    parser.add_argument("--days", type=int, nargs="+", default=[1], help="days that the first run loads")
    parser.add_argument("--without-gate", action="store_true", help="run without the gate")
    parser.add_argument("--folder", type=Path, help="folder with histories of an earlier benchmark")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    gate = not arguments.without_gate
    with (
        tempfile.TemporaryDirectory(prefix="faletl-bench-") as name,
        time_machine.travel(FIRST, tick=False) as clock,
        Sandbox(Busy(account="bench"), page_size=1000) as sandbox,
    ):
        root = arguments.folder or Path(name)
        watch = Watch(root / "work" / "landing")
        for days in arguments.days:
            if not (root / f"{days}").exists():
                (root / f"{days}").mkdir(parents=True)
                grow(root / f"{days}", days, arguments.after, sandbox.url, watch, clock, gate=gate)
        costs_by_history: dict[tuple[int, int], list[Cost]] = {}
        for _ in range(ROUNDS + 1):
            for days, after in product(arguments.days, arguments.after):
                shutil.copytree(root / f"{days}" / f"{after}", root / "work")
                clock.move_to(FIRST + after * HOUR, tick=False)
                cost = measure_run(settings_of(sandbox.url, root / "work", days, gate=gate), watch)
                costs_by_history.setdefault((days, after), []).append(cost)
                shutil.rmtree(root / "work")
    print_results(
        {"days": days, "after": after, **_median(costs[1:])}
        for (days, after), costs in costs_by_history.items()
    )


def _median(costs: list[Cost]) -> dict[str, Any]:
    """Return the median of each figure."""
    return {
        name: round(statistics.median(getattr(cost, name) for cost in costs), 2)
        for name in asdict(costs[0])
    }


if __name__ == "__main__":
    main()
