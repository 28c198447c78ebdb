"""Many windows from a server that takes its time: beside what latency and CPU alone would take.

    python -m benchmarks.latency

40 days of 100 pages each, 300 ms an answer, with 4 and with 8 requests at once. Latency alone takes a
page's time for each page, and for what is asked beside them, shared by so many at once; CPU alone is the
same run where answers take no time. One round: a run takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path

from benchmarks import ours
from benchmarks.account import held, serving, total, write_pages
from benchmarks.measure import Spent, figures, tell
from tests.feed import Feed

FIRST = date(2026, 9, 1)
BESIDE_PAGES = 5
"""Requests for a day beside its pages: two totals, the first page once more, usage and its total."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--pages", type=int, default=100, help="of each window")
    parser.add_argument("--rows", type=int, default=100, help="of each page")
    parser.add_argument("--seconds", type=float, default=0.3, help="that an answer takes")
    asked = parser.parse_args()
    feed = Feed(FIRST, asked.windows, asked.pages * asked.rows, asked.rows)
    lines = []
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        pages = Path(name) / "pages"
        write_pages(feed, pages)

        def run(seconds: float, at_once: int) -> Spent:
            with serving(pages, seconds) as url, tempfile.TemporaryDirectory(dir=name) as inner:
                settings = ours.environment(url, Path(inner), PARALLEL=str(at_once))
                spent = ours.run(FIRST, settings, days=asked.windows, builds=False)
                assert held(Path(inner) / "warehouse.duckdb", "raw.billing_events") == total(feed)
                return spent

        for at_once in (4, 8):
            by_cpu = run(0, at_once).wall_s
            by_latency = asked.windows * (asked.pages + BESIDE_PAGES) * asked.seconds / at_once
            spent = run(asked.seconds, at_once)
            lines.append(
                {
                    "at once": at_once,
                    "latency alone s": round(by_latency, 1),
                    "CPU alone s": round(by_cpu, 1),
                    **figures(spent),
                    "times the larger": round(spent.wall_s / max(by_latency, by_cpu), 2),
                }
            )
    tell(lines)


if __name__ == "__main__":
    main()
