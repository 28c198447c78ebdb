"""Measure commands in processes of their own, interleaved; print medians as JSON and a table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROUNDS = 5


@dataclass(frozen=True)
class Spent:
    """Wall and CPU (user and system) seconds, and the peak of resident memory, in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: int

    def __add__(self, other: Spent) -> Spent:
        """Return the cost of both, one after the other."""
        seconds = (self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)
        return Spent(*seconds, max(self.peak_mib, other.peak_mib))


def spent(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Spent:
    """Run the command with only PATH of our environment; exit if it fails."""
    began = time.monotonic()
    child = subprocess.Popen(
        [str(word) for word in command],
        env={"PATH": os.environ["PATH"], **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}:\n{output.decode()[-4000:]}")
    return Spent(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024)


def faletl(*words: str) -> list[str]:
    """Return the command line of faletl with these arguments."""
    return [sys.executable, "-m", "faletl", *words]


def side_by_side(variants: Mapping[str, Callable[[], Spent]], rounds: int = ROUNDS) -> dict[str, Spent]:
    """Return the median of each variant; every round runs all of them once."""
    results: dict[str, list[Spent]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            results[name].append(run())
    return {name: median(spents) for name, spents in results.items()}


def median(spents: Sequence[Spent]) -> Spent:
    """Return the median of each figure by itself."""
    return Spent(
        statistics.median(run.wall_s for run in spents),
        statistics.median(run.cpu_s for run in spents),
        int(statistics.median(run.peak_mib for run in spents)),
    )


def figures(result: Spent) -> dict[str, Any]:
    """Return the figures for a result line, rounded to hundredths."""
    return {name: round(value, 2) for name, value in asdict(result).items()}


def print_results(lines: Iterable[Mapping[str, Any]]) -> None:
    """Print each result as a JSON line, then all as a small table."""
    results = list(lines)
    for line in results:
        print(json.dumps(line), flush=True)
    names = list(dict.fromkeys(name for line in results for name in line))
    rows = [names, *([_cell(line.get(name)) for name in names] for line in results)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(names))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def environment_of(folder: Path, packages: Sequence[str]) -> Path:
    """Create a throw-away environment with these packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
