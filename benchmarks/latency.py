"""Many windows from a slow server, compared with the time of latency alone and of CPU alone.

    python -m benchmarks.latency

40 days of 100 pages each, 300 ms per answer, with 4 and with 8 requests at once. Latency alone is
the sum of the times of all answers, divided by the number of requests at once; CPU alone is the
same run with immediate answers. There is one round, because a run takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path

from benchmarks import ours
from benchmarks.account import loaded_total, served_total, serving, write_pages
from benchmarks.measure import Spent, figures, print_results
from tests.feed import Feed

FIRST = date(2026, 9, 1)
OTHER_REQUESTS_PER_DAY = 5
"""Requests for a day in addition to its pages: two totals, the first page again, usage and its total."""


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--pages", type=int, default=100, help="of each window")
    parser.add_argument("--rows", type=int, default=100, help="of each page")
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds per answer")
    arguments = parser.parse_args()
    feed = Feed(FIRST, arguments.windows, arguments.pages * arguments.rows, arguments.rows)
    lines = []
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        pages = Path(name) / "pages"
        write_pages(feed, pages)

        def run(seconds: float, at_once: int) -> Spent:
            with serving(pages, seconds) as url, tempfile.TemporaryDirectory(dir=name) as inner:
                settings = ours.environment(url, Path(inner), PARALLEL=str(at_once))
                spent = ours.run(FIRST, settings, days=arguments.windows, builds=False)
                assert loaded_total(
                    Path(inner) / "warehouse.duckdb", "raw.billing_events"
                ) == served_total(feed)
                return spent

        for at_once in (4, 8):
            by_cpu = run(0, at_once).wall_s
            by_latency = (
                arguments.windows
                * (arguments.pages + OTHER_REQUESTS_PER_DAY)
                * arguments.seconds
                / at_once
            )
            spent = run(arguments.seconds, at_once)
            lines.append(
                {
                    "at once": at_once,
                    "latency alone s": round(by_latency, 1),
                    "CPU alone s": round(by_cpu, 1),
                    **figures(spent),
                    "times the larger": round(spent.wall_s / max(by_latency, by_cpu), 2),
                }
            )
    print_results(lines)


if __name__ == "__main__":
    main()
