"""The same charges, faults and kills for faletl, dlt and a careful script: who has them all afterwards?

    python -m benchmarks.peers_under_faults --events 100000

Each tool runs against a server of its own that draws the same faults from the same seed, and is started
again until it says that it is done (exit code 0). Three trials: nothing goes wrong; a tenth of the
answers is broken (tests/faults.py); the first ten runs are killed as well. Then what each warehouse
holds is compared with what was served, charge by charge. The peers live in an environment of their own
that is made for this, from the package index; benchmarks/peers has their code.
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
MOST_RUNS = 60
KILLED_RUNS = 10
NANO = Decimal("1e-9")
TRIALS = (("nothing", 0, 0.0), ("faults", 0, 0.1), ("faults and kills", KILLED_RUNS, 0.1))

Held = Callable[[Path], Counter[tuple[str, Decimal]]]


def faletl(url: str, folder: Path, feed: Feed) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
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
    """A peer's command."""

    def command(url: str, folder: Path, feed: Feed) -> tuple[list[str], dict[str, str]]:
        words = [str(python), str(PEERS / script), url, str(folder / "warehouse.duckdb")]
        return [*words, str(feed.first), str(feed.days)], {"HOME": str(folder)}

    return command


def held(path: Path, table: str) -> Counter[tuple[str, Decimal]]:
    """The charges in a warehouse, to the nano-dollar; none where there is no such table."""
    if not path.exists():
        return Counter()
    with duckdb.connect(str(path), read_only=True) as warehouse:
        try:
            found = warehouse.execute(f"select request_id, cast(cost_total as varchar) from {table}")
        except duckdb.CatalogException:
            return Counter()
        return Counter((one, Decimal(cost or 0).quantize(NANO)) for one, cost in found.fetchall())


def trial(
    command: Any, table: str, published: str, asked: Any, kills: int, share: float
) -> dict[str, Any]:
    """Run a tool until it is done; what it then holds."""
    chance = random.Random(asked.seed)  # noqa: S311  # a repeatable trial, not secrecy
    first = datetime.now(UTC).date() - timedelta(days=DAYS + 2)
    feed = Feed(first, DAYS, asked.events // DAYS, asked.events // DAYS // 10)
    with tempfile.TemporaryDirectory() as name, serving(feed, asked.seed, share) as served:
        folder, started, codes = Path(name), time.monotonic(), list[int]()
        served.is_broken.value = int(share > 0)
        words, environment = command(served.url, folder, feed)
        while (not codes or codes[-1]) and len(codes) < MOST_RUNS:
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
        ours = held(folder / published, table)
        theirs = Counter(
            (one.request_id, Decimal(money(one.nano)))
            for number in range(feed.days)
            for one in feed.events(number)
        )
        surplus = ours - theirs
        return {
            "says": "done" if codes[-1] == 0 else f"exit {codes[-1]}",
            "runs": len(codes),
            "lost": (theirs - ours).total(),
            "doubled": sum(many for row, many in surplus.items() if row in theirs),
            "wrong": sum(many for row, many in surplus.items() if row not in theirs),
            "pages": served.fetched,
            "kinds of faults": sum(many > 0 for many in served.faults),
            "seconds": round(time.monotonic() - started, 1),
        }


def main(given: Sequence[str] | None = None) -> None:
    """Three tools, three trials; JSON lines, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", type=Path, help="of an environment that has the peers already")
    asked = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        python = asked.python or environment_of(Path(folder) / "peers", PACKAGES)
        tools = {
            "faletl": (faletl, "marts.fct_billing_event", "spend.duckdb"),
            "dlt": (peer(python, "dlt_events.py"), "fal.billing_events", "warehouse.duckdb"),
            "script": (peer(python, "httpx_events.py"), "billing_events", "warehouse.duckdb"),
        }
        lines = []
        for what, kills, share in TRIALS:
            for name, (command, table, published) in tools.items():
                found = trial(command, table, published, asked, kills, share)
                lines.append({"goes wrong": what, "tool": name, **found})
                sys.stdout.write(json.dumps(lines[-1]) + "\n")
                sys.stdout.flush()
    sys.stdout.write("\n" + " | ".join(f"{name:>16}" for name in lines[0]) + "\n")
    for line in lines:
        sys.stdout.write(" | ".join(f"{value!s:>16}" for value in line.values()) + "\n")
    sys.stdout.write(f"\n{len(KINDS)} kinds of faults, seed {asked.seed}\n")


if __name__ == "__main__":
    main()
