"""Measure commands side by side: processes of their own, interleaved; medians as JSON and a table."""

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
    """Wall and CPU (user and system) seconds, and the most memory that was resident, in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: int

    def __add__(self, other: Spent) -> Spent:
        """One after the other."""
        seconds = (self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)
        return Spent(*seconds, max(self.peak_mib, other.peak_mib))


def spent(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Spent:
    """Run the command, with nothing of our environment but PATH; it must do."""
    began = time.monotonic()
    child = subprocess.Popen(
        [str(word) for word in command],
        env={"PATH": os.environ["PATH"], **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}:\n{said.decode()[-4000:]}")
    return Spent(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)


def faletl(*words: str) -> list[str]:
    """Our command line."""
    return [sys.executable, "-m", "faletl", *words]


def side_by_side(variants: Mapping[str, Callable[[], Spent]], rounds: int = ROUNDS) -> dict[str, Spent]:
    """The median of each; all have their turn in each round."""
    found: dict[str, list[Spent]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            found[name].append(run())
    return {name: median(spents) for name, spents in found.items()}


def median(spents: Sequence[Spent]) -> Spent:
    """Of each figure by itself."""
    return Spent(
        statistics.median(one.wall_s for one in spents),
        statistics.median(one.cpu_s for one in spents),
        int(statistics.median(one.peak_mib for one in spents)),
    )


def figures(one: Spent) -> dict[str, Any]:
    """For a line: seconds to the hundredth."""
    return {name: round(value, 2) for name, value in asdict(one).items()}


def tell(lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSON line each, then a small table."""
    told = list(lines)
    for line in told:
        print(json.dumps(line), flush=True)
    names = list(dict.fromkeys(name for line in told for name in line))
    rows = [names, *([_shown(line.get(name)) for name in names] for line in told)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(names))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(flush=True)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def environment_of(folder: Path, packages: Sequence[str]) -> Path:
    """Make a throw-away environment with these packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python
