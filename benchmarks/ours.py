"""Run faletl over days of a large account that is served from a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

from benchmarks.measure import Spent, spent

WITHOUT_BUILD = """
from faletl import cli, pipeline
pipeline.build_and_publish = lambda settings, report: None
cli.main()
"""


def environment(url: str, folder: Path, **more: str) -> dict[str, str]:
    """Return settings of a warehouse in the folder; `more` are others, without their prefix."""
    return {
        "FAL_KEY": "bench:not-a-secret",
        "FALETL_ACCOUNT": "bench",
        "FALETL_API_URL": url,
        "FALETL_WAREHOUSE": f"duckdb:///{folder / 'warehouse.duckdb'}",
        "FALETL_LANDING": str(folder / "landing"),
        "FALETL_RATE": "0",
        **{f"FALETL_{name}": value for name, value in more.items()},
    }


def run(
    first: date,
    settings: dict[str, str],
    *,
    days: int = 1,
    builds: bool = True,
    resources: Sequence[str] = ("usage", "billing_events"),
) -> Spent:
    """Run `faletl run` for the days; without `builds` it stops after the load."""
    start = ["-m", "faletl"] if builds else ["-c", WITHOUT_BUILD]
    words = ["run", "--start", f"{first}", "--end", f"{first + timedelta(days=days)}"]
    words += [f"--resource={name}" for name in resources]
    return spent([sys.executable, *start, *words], settings)
