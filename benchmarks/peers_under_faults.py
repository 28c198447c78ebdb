"""The same charges, faults and kills for faletl, dlt and a careful script: which load all charges?

    python -m benchmarks.peers_under_faults --events 100000

Each tool runs against its own server, which draws the same faults from the same seed, and is
started again until it reports success (exit code 0). There are three trials: without faults; with a
tenth of the answers broken (tests/faults.py); with the first ten runs killed as well. Then the
charges in each warehouse are compared with the served ones. The peers run in a temporary
environment with packages from the index; benchmarks/peers has their code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb

from benchmarks.measure import environment_of
from tests.chaos import serving
from tests.faults import KINDS
from tests.feed import Feed, money

PEERS = Path(__file__).parent / "peers"
PACKAGES = (
    "dlt[duckdb,parquet]==1.31.0", "httpx==0.28.1", "pyarrow",
    f"duckdb=={duckdb.__version__}",  # whose files ours can read
)  # fmt: skip
DAYS = 10
MAX_RUNS = 60
KILLED_RUNS = 10
NANO = Decimal("1e-9")
TRIALS = (("nothing", 0, 0.0), ("faults", 0, 0.1), ("faults and kills", KILLED_RUNS, 0.1))

ChargesIn = Callable[[Path], Counter[tuple[str, Decimal]]]


def faletl(url: str, folder: Path, feed: Feed) -> tuple[list[str], dict[str, str]]:
    """Return the command of faletl and its environment."""
    words = ["-m", "faletl", "run", "--resource", "usage", "--resource", "billing_events"]
    return [sys.executable, *words], {
        "FAL_KEY": "sandbox-full:not-a-secret",
        "FALETL_ACCOUNT": "peers",
        "FALETL_API_URL": url,
        "FALETL_WAREHOUSE": f"duckdb:///{folder / 'warehouse.duckdb'}",
        "FALETL_LANDING": str(folder / "landing"),
        "FALETL_FIRST_DAYS": str(feed.days + 2),
        "FALETL_RATE": "0",
    }


def peer(python: Path, script: str) -> Callable[[str, Path, Feed], tuple[list[str], dict[str, str]]]:
    """Return a function that returns the command of a peer and its environment."""

    def command(url: str, folder: Path, feed: Feed) -> tuple[list[str], dict[str, str]]:
        words = [str(python), str(PEERS / script), url, str(folder / "warehouse.duckdb")]
        return [*words, str(feed.first), str(feed.days)], {"HOME": str(folder)}

    return command


def charges_in(path: Path, table: str) -> Counter[tuple[str, Decimal]]:
    """Return the charges in a warehouse, to the nano-dollar; none if there is no such table."""
    if not path.exists():
        return Counter()
    with duckdb.connect(str(path), read_only=True) as warehouse:
        try:
            rows = warehouse.execute(f"select request_id, cast(cost_total as varchar) from {table}")
        except duckdb.CatalogException:
            return Counter()
        return Counter(
            (request_id, Decimal(cost or 0).quantize(NANO)) for request_id, cost in rows.fetchall()
        )


def trial(
    command: Any, table: str, published: str, arguments: Any, kills: int, share: float
) -> dict[str, Any]:
    """Run a tool until it succeeds; return how its charges differ from the served ones."""
    chance = random.Random(arguments.seed)  # noqa: S311  # a repeatable trial, not secrecy
    first = datetime.now(UTC).date() - timedelta(days=DAYS + 2)
    feed = Feed(first, DAYS, arguments.events // DAYS, arguments.events // DAYS // 10)
    with tempfile.TemporaryDirectory() as name, serving(feed, arguments.seed, share) as served:
        folder, started, codes = Path(name), time.monotonic(), list[int]()
        served.is_broken.value = int(share > 0)
        words, environment = command(served.url, folder, feed)
        while (not codes or codes[-1]) and len(codes) < MAX_RUNS:
            process = subprocess.Popen(
                words, env={"PATH": os.environ["PATH"], **environment},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if len(codes) < kills:
                try:
                    process.wait(chance.uniform(1, 12))
                except subprocess.TimeoutExpired:
                    process.kill()
            codes.append(process.wait())
        loaded = charges_in(folder / published, table)
        served_charges = Counter(
            (event.request_id, Decimal(money(event.nano)))
            for number in range(feed.days)
            for event in feed.events(number)
        )
        surplus = loaded - served_charges
        return {
            "says": "done" if codes[-1] == 0 else f"exit {codes[-1]}",
            "runs": len(codes),
            "lost": (served_charges - loaded).total(),
            "doubled": sum(count for row, count in surplus.items() if row in served_charges),
            "wrong": sum(count for row, count in surplus.items() if row not in served_charges),
            "pages": served.fetched,
            "kinds of faults": sum(count > 0 for count in served.faults),
            "seconds": round(time.monotonic() - started, 1),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Run three tools in three trials; print JSON lines, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", type=Path, help="Python of an environment with the peers")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        python = arguments.python or environment_of(Path(folder) / "peers", PACKAGES)
        tools = {
            "faletl": (faletl, "marts.fct_billing_event", "spend.duckdb"),
            "dlt": (peer(python, "dlt_events.py"), "fal.billing_events", "warehouse.duckdb"),
            "script": (peer(python, "httpx_events.py"), "billing_events", "warehouse.duckdb"),
        }
        lines = []
        for fault, kills, share in TRIALS:
            for name, (command, table, published) in tools.items():
                outcome = trial(command, table, published, arguments, kills, share)
                lines.append({"goes wrong": fault, "tool": name, **outcome})
                sys.stdout.write(json.dumps(lines[-1]) + "\n")
                sys.stdout.flush()
    sys.stdout.write("\n" + " | ".join(f"{name:>16}" for name in lines[0]) + "\n")
    for line in lines:
        sys.stdout.write(" | ".join(f"{value!s:>16}" for value in line.values()) + "\n")
    sys.stdout.write(f"\n{len(KINDS)} kinds of faults, seed {arguments.seed}\n")


if __name__ == "__main__":
    main()
