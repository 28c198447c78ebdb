"""Extract and load a day of billing events: faletl, DuckDB alone, dlt and pandas.

    python -m benchmarks.extract_load --events 1000000

faletl is `faletl run` without its build: all pages landed compressed, every amount exact, the day proven
against fal's usage, one transaction. DuckDB alone reads the same records from disk, without any of that:
no tool on DuckDB can be faster. The peers call the same server (benchmarks/peers). The figure is CPU;
medians of five rounds.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import duckdb
import msgspec

from benchmarks import ours
from benchmarks.account import loaded_total, served_total, serving, write_pages
from benchmarks.measure import ROUNDS, Spent, environment_of, figures, print_results, side_by_side, spent
from tests.feed import Feed

DAY = date(2026, 11, 1)
PEERS = Path(__file__).parent / "peers"
PACKAGES = (
    "dlt[duckdb,parquet]==1.31.0", "httpx==0.28.1", "pandas==3.1.1", "pyarrow",
    f"duckdb=={duckdb.__version__}",
)  # fmt: skip


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--python", type=Path, help="Python of an environment with the peers")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        root = Path(name)
        python = arguments.python or environment_of(root / "peers", PACKAGES)
        feed = Feed(DAY, 1, arguments.events)
        write_pages(feed, root / "pages")
        for page in (root / "pages").glob("*/page-*.json"):
            records = msgspec.json.decode(page.read_bytes(), type=dict[str, msgspec.Raw])
            page.with_name(f"records-{page.stem}.json").write_bytes(records["billing_events"])
        served = served_total(feed)
        with serving(root / "pages") as url:

            def fresh(run: Callable[[Path], Spent], table: str) -> Callable[[], Spent]:
                def once() -> Spent:
                    folder = root / "run"
                    folder.mkdir()
                    results = run(folder)
                    assert loaded_total(folder / "warehouse.duckdb", table) == served, table
                    shutil.rmtree(folder)
                    return results

                return once

            def peer(script: str, *options: str) -> Callable[[Path], Spent]:
                def run(folder: Path) -> Spent:
                    words = [
                        python,
                        PEERS / script,
                        *options[:1],
                        folder / "warehouse.duckdb",
                        *options[1:],
                    ]
                    return spent(words, {"HOME": str(folder)})

                return run

            variants = {
                "duckdb": fresh(peer("duckdb_pages.py", str(root / "pages")), "billing_events"),
                "faletl": fresh(
                    lambda folder: ours.run(DAY, ours.environment(url, folder, GATE="0"), builds=False),
                    "raw.billing_events",
                ),
                "pandas": fresh(peer("pandas_events.py", url, str(DAY)), "billing_events"),
                "dlt arrow": fresh(peer("dlt_arrow_events.py", url, str(DAY)), "fal.billing_events"),
                "dlt rest": fresh(peer("dlt_events.py", url, str(DAY), "1"), "fal.billing_events"),
            }
            chosen = {name: run for name, run in variants.items() if name not in arguments.without}
            results = side_by_side(chosen, arguments.rounds)
    limit = results["duckdb"].cpu_s
    print_results(
        {"work": "extract and load", "events": arguments.events, "tool": name, **figures(result),
         "times_duckdb": round(result.cpu_s / limit, 2)}
        for name, result in results.items()
    )  # fmt: skip


if __name__ == "__main__":
    main()
