"""What an hourly run costs after many others: the same windows, behind ever more history.

    python -m benchmarks.hourly --after 12 108 204 396
    python -m benchmarks.hourly --after 12 --days 10 365

A run for each hour of a moving clock, of an account with 20 lines in every hour; on each third day one
of them arrives a day late. After each of these numbers of runs the folder is kept, and in the end one
more run is made in a copy of each, in turn: at noon, when no day is due but the open one. With `--days`
the first run of all loads that many days. Counted are CPU, statements to the warehouse, files and
folders of the landing that Python opened, listed or changed, and how many of these belong to windows
that were not due. `copy_s` is what a copy of the published file takes, which is as large as the
warehouse. Everything is one process, the server included, which answers the same questions alike.
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

from benchmarks.measure import ROUNDS, tell
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
"""How long after its hour a late line is shown: its day has been extracted several times by then."""


class Busy(Account):
    """An account that uses every endpoint in every hour; on each third day one line arrives late."""

    def prices(self) -> dict[str, dict[str, Any]]:
        """A list price for every endpoint."""
        for endpoint_id in ENDPOINTS:
            self.list_price(endpoint_id, "0.025")
        return self.listed

    def usage(self, start: datetime, end: datetime) -> list[UsageLine]:
        """The lines of the hours asked for that have arrived."""
        now, first = self.now(), start.replace(hour=0, minute=0)
        days = [lines_of((first + number * DAY).date()) for number in range((end - first).days + 1)]
        return [
            one
            for lines in days
            for one, arrives_at in lines
            if start <= one.hour < end and arrives_at <= now
        ]

    def billing_events(self, start: datetime, end: datetime) -> list[BillingEvent]:
        """The charges of those lines."""
        lines = self.usage(start.replace(minute=0, second=0, microsecond=0), end)
        return [one for one in charges(lines) if start <= one.timestamp < end]

    def calls(self, start: datetime, end: datetime) -> Any:
        """The requests of those lines."""
        return Account(lines=self.usage(start, end)).calls(start, end)

    def endpoints_called(self) -> set[str]:
        """All endpoints: the server need not look for them."""
        return set(ENDPOINTS)


@lru_cache(maxsize=400)
def lines_of(day: date) -> list[tuple[UsageLine, datetime]]:
    """The lines of a day, each with the moment from which on fal shows it."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    found = []
    for hour in range(24):
        at = midnight + hour * HOUR
        for number, endpoint in enumerate(ENDPOINTS):
            is_late = day.toordinal() % 3 == 0 and (hour, number) == (20, 0)
            found.append((line(at, endpoint, str(1 + (hour + number) % 7)), at + LATE * is_late))
    return found


@dataclass
class Cost:
    """What a run took."""

    windows: int = 0
    cpu_s: float = 0
    statements: int = 0
    touched: int = 0
    not_due: int = 0
    copy_s: float = 0
    warehouse_mib: float = 0


def settings_of(url: str, folder: Path, days: int, *, gate: bool) -> Settings:
    """Settings of a warehouse in the folder."""
    return Settings.isolated(
        key=FULL_KEY, api_url=url, warehouse=f"duckdb:///{folder / 'warehouse.duckdb'}",
        landing=str(folder / "landing"), first_days=days, rate=0, gate=gate,
    )  # fmt: skip


def one_run(settings: Settings, watch: Watch) -> Cost:
    """A plain run, as `faletl run` makes it."""
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
    windows = {(one.resource, f"{one.window.day}") for one in report.outcomes}
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
    """Make a history of that many days and runs; keep its folder after each of these numbers of runs."""
    folder = root / "grown"
    folder.mkdir()
    for number in range(max(after)):
        clock.move_to(FIRST + number * HOUR, tick=False)
        cost = one_run(settings_of(url, folder, days, gate=gate), watch)
        print(f"{days} days, run {number}: {cost}", file=sys.stderr, flush=True)
        if number + 1 in after:
            shutil.copytree(folder, root / f"{number + 1}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[12, 396], help="runs before")
    parser.add_argument("--days", type=int, nargs="+", default=[1], help="that the first run loads")
    parser.add_argument("--without-gate", action="store_true", help="to see what else there is")
    parser.add_argument("--folder", type=Path, help="of histories that an earlier benchmark kept")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    gate = not asked.without_gate
    with (
        tempfile.TemporaryDirectory(prefix="faletl-bench-") as name,
        time_machine.travel(FIRST, tick=False) as clock,
        Sandbox(Busy(account="bench"), page_size=1000) as sandbox,
    ):
        root = asked.folder or Path(name)
        watch = Watch(root / "work" / "landing")
        for days in asked.days:
            if not (root / f"{days}").exists():
                (root / f"{days}").mkdir(parents=True)
                grow(root / f"{days}", days, asked.after, sandbox.url, watch, clock, gate=gate)
        found: dict[tuple[int, int], list[Cost]] = {}
        for _ in range(ROUNDS + 1):
            for days, after in product(asked.days, asked.after):
                shutil.copytree(root / f"{days}" / f"{after}", root / "work")
                clock.move_to(FIRST + after * HOUR, tick=False)
                cost = one_run(settings_of(sandbox.url, root / "work", days, gate=gate), watch)
                found.setdefault((days, after), []).append(cost)
                shutil.rmtree(root / "work")
    tell({"days": days, "after": after, **_median(costs[1:])} for (days, after), costs in found.items())


def _median(costs: list[Cost]) -> dict[str, Any]:
    """The median of each figure."""
    return {
        name: round(statistics.median(getattr(one, name) for one in costs), 2)
        for name in asdict(costs[0])
    }


if __name__ == "__main__":
    main()
