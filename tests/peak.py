"""A process of its own for tests of memory: what runs of some days take above a usual one.

    python -m tests.peak RUNS

RUNS is JSON: for each run the URL of its server, its folder and its resource. For each a line of JSON
is written: exit code, failures, rows, and how many bytes more than at its start were resident at most.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faletl import pipeline
from faletl.selection import Asked
from tests import truth
from tests.conftest import settings_for

DAYS = 4


def resident(name: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def forget_peak() -> None:
    """Let the kernel take what is resident now for the most."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """See the module."""
    for url, folder, resource in json.loads(sys.argv[1]):
        settings = settings_for(url, Path(folder), parallel=DAYS)
        forget_peak()
        before = resident("VmRSS")
        report = pipeline.run(settings, Asked(truth.day(19), truth.day(19 + DAYS), [resource]))
        print(
            json.dumps(
                {
                    "exit_code": report.exit_code,
                    "failures": [str(error) for _, error in report.failures],
                    "rows": sum(one.rows for one in report.outcomes),
                    "peak": resident("VmHWM") - before,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
