"""The cost of a day of charges from page to published table, for growing numbers of charges.

    python -m benchmarks.whole_run 1000000 5000000

The whole `faletl run`: landed compressed, proven against usage, past the gate, loaded, built, checked,
published. The sum in the published copy must be the one served. One round of each size.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.account import loaded_total, served_total, serving, write_pages
from benchmarks.measure import figures, print_results
from tests.feed import Feed

DAY = date(2026, 11, 1)


def measured(events: int, memory: str) -> dict[str, Any]:
    """Serve and load `events` charges in a new folder; return the figures of the run."""
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        folder, feed = Path(name), Feed(DAY, 1, events)
        write_pages(feed, folder / "pages")
        with serving(folder / "pages") as url:
            spent = ours.run(DAY, ours.environment(url, folder, MEMORY=memory))
        assert loaded_total(folder / "spend.duckdb", "marts.fct_billing_event") == served_total(feed)
        return {
            "work": "run", "events": events, "memory": memory, **figures(spent),
            "landed_mib": sum(page.stat().st_size for page in (folder / "landing").rglob("*.zst")) >> 20,
            "warehouse_mib": (folder / "warehouse.duckdb").stat().st_size >> 20,
        }  # fmt: skip


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("events", type=int, nargs="+", help="number of charges of the day")
    parser.add_argument("--memory", default="256MB", help="FALETL_MEMORY of the run")
    arguments = parser.parse_args()
    print_results([measured(events, arguments.memory) for events in arguments.events])


if __name__ == "__main__":
    main()
