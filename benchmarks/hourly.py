"""What an hourly run costs after many others: the same windows, behind ever more history.

    python -m benchmarks.hourly --runs 400
    python -m benchmarks.hourly --runs 30 --days 10 365

A run for each hour of a moving clock, of an account with 20 lines in every hour, of which some arrive a
day late. After that each run is compared with those that extracted the same windows, by their age, at
the same hour of a day: CPU, statements to the warehouse, files and folders of the landing that were
opened, listed or changed, and how many of those belong to windows that were not due. `copy_ms` is a copy
of the published file, which is as large as the warehouse. With `--days`, the first run loads that many
days, and the runs behind it are compared.

Everything is one process, the server included (its answers are as large for the same windows).
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import time_machine

from benchmarks.measure import tell
from faletl import pipeline
from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox
from faletl.sandbox.world import BillingEvent, UsageLine
from tests.truth import Account, charges, line

FIRST = datetime(2026, 1, 5, 0, 30, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ENDPOINTS = tuple(f"bench/endpoint-{number:02d}" for number in range(20))
LATE = timedelta(hours=27)
"""How long after its hour a late line is shown: its day has been extracted several times by then."""

OFFICE_HOURS = range(9, 15)
"""Hours at which, as a rule, no day is due but the open one."""


class Busy(Account):
    """An account that uses every endpoint in every hour; on each third day one line arrives late."""

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
    """What a run took; `windows` are those that it extracted, by resource and age in days."""

    windows: tuple[tuple[str, int], ...] = ()
    cpu_s: float = 0
    statements: int = 0
    touched: int = 0
    not_due: int = 0
    copy_ms: float = 0
    asked: set[str] = field(default_factory=set)


class Watch:
    """Counts the files and folders below a folder that Python opens, lists or changes."""

    EVENTS = frozenset(
        ["open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"]
    )

    def __init__(self, folder: Path) -> None:
        self._start = f"{folder}/"
        self.touched: list[str] | None = None
        sys.addaudithook(self._seen)  # a hook stays as long as the process

    def _seen(self, event: str, given: tuple[Any, ...]) -> None:
        if self.touched is not None and event in self.EVENTS:
            path = str(given[0])
            if path.startswith(self._start):
                self.touched.append(path.removeprefix(self._start))


@contextmanager
def counting(cost: Cost, watch: Watch) -> Iterator[None]:
    """Count statements, files and CPU."""

    def count(*_: Any) -> None:
        cost.statements += 1

    watch.touched = []
    sa.event.listen(sa.Engine, "after_cursor_execute", count)
    began = time.process_time()
    try:
        yield
    finally:
        cost.cpu_s = time.process_time() - began
        sa.event.remove(sa.Engine, "after_cursor_execute", count)
        cost.touched, cost.asked = len(watch.touched), set(watch.touched)
        watch.touched = None


def one_run(settings: Settings, watch: Watch, now: datetime) -> Cost:
    """A plain run, as `faletl run` makes it."""
    cost = Cost()
    with counting(cost, watch):
        report = pipeline.run(settings)
    assert report.exit_code == 0, report.failures
    windows = {(one.resource, one.window.day) for one in report.outcomes}
    cost.windows = tuple(
        sorted((one.resource, (now.date() - one.window.day).days) for one in report.outcomes)
    )
    cost.not_due = sum(not _is_of(path, windows) for path in cost.asked)
    published = Path(report.published or "")
    began = time.process_time()
    if report.published:
        shutil.copyfile(published, published.with_suffix(".copy"))
        published.with_suffix(".copy").unlink()
    cost.copy_ms = round(1000 * (time.process_time() - began), 1)
    return cost


def _is_of(path: str, windows: set[tuple[str, date]]) -> bool:
    """Whether a path of the landing (account, resource, day, …) is no other window's."""
    parts = path.split("/")
    return len(parts) < 3 or (parts[1], parts[2]) in {(name, f"{day}") for name, day in windows}


def history(runs: int, days: int, folder: Path, *, gate: bool) -> list[Cost]:
    """The cost of each of that many hourly runs; the first one loads the days before, too."""
    folder.mkdir()
    watch = Watch(folder / "landing")
    with (
        time_machine.travel(FIRST, tick=False) as clock,
        Sandbox(Busy(account="bench"), page_size=1000) as sandbox,
    ):
        settings = Settings.isolated(
            key=FULL_KEY, api_url=sandbox.url, warehouse=f"duckdb:///{folder / 'warehouse.duckdb'}",
            landing=str(folder / "landing"), first_days=days, rate=0, gate=gate,
        )  # fmt: skip
        found = []
        for number in range(runs):
            now = FIRST + number * HOUR
            clock.move_to(now, tick=False)
            found.append(one_run(settings, watch, now))
            print(f"run {number}: {found[-1].cpu_s:.2f} s, {found[-1].statements} statements, "
                  f"{found[-1].touched} touched, {len(found[-1].windows)} windows",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found


def compared(costs: list[Cost], after: list[int]) -> Iterator[dict[str, Any]]:
    """A line for the runs at office hours of the day before each of those numbers of runs."""
    usual = _most_usual(costs)
    for number in after:
        near = range(max(1, number - 24), number + 1)
        alike = [
            costs[n]
            for n in near
            if n < len(costs) and n % 24 in OFFICE_HOURS and costs[n].windows == usual
        ]
        if not alike:
            continue
        yield {
            "after": number, "runs": len(alike), "windows": len(usual),
            **{name: round(statistics.median(getattr(one, name) for one in alike), 2)
               for name in ("cpu_s", "statements", "touched", "not_due", "copy_ms")},
        }  # fmt: skip


def _most_usual(costs: list[Cost]) -> tuple[tuple[str, int], ...]:
    """The windows that most runs at office hours extract."""
    seen = [one.windows for number, one in enumerate(costs) if number % 24 in OFFICE_HOURS]
    return statistics.mode(seen)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--days", type=int, nargs="+", default=[1], help="that the first run loads")
    parser.add_argument("--without-gate", action="store_true", help="to find what else grows")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    after = [number for number in (15, 24, 48, 100, 200, 400, 800) if number <= asked.runs]
    lines = []
    for days in asked.days:
        with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
            costs = history(asked.runs, days, Path(name) / "hourly", gate=not asked.without_gate)
            lines += [{"days": days, **one} for one in compared(costs, after)]
    tell(lines)


if __name__ == "__main__":
    main()
