"""What Airflow pays to parse the folder of DAGs, beside what it pays for its own SDK.

    python benchmarks/parse_dags.py

Each measure is a process of its own, with byte-code cached; runs are interleaved, medians of CPU seconds
(user and system). Airflow parses with the SDK already imported: what parsing adds is the last line less
the one before. Prints one JSON line per measure, then a table.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

RUNS = 7
DAGS = Path(__file__).parents[1] / "dags"
NAMES = (
    "Asset, BaseHook, BaseNotifier, CronDataIntervalTimetable, DAG, Param, RetryPolicy, TaskGroup, task"
)

MEASURES = {
    "import airflow.sdk": "import airflow.sdk",
    "its names that DAGs use, a task, an asset": f"from airflow.sdk import {NAMES}; task.sensor; Asset('x://y')",
    "parse dags/": f"""
import runpy
from pathlib import Path
for path in sorted(Path({str(DAGS)!r}).glob('*.py')):
    runpy.run_path(str(path))
""",
}


def cpu_seconds(code: str) -> float:
    """User and system seconds of a process that runs the code."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """See the module."""
    times: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(RUNS):
        for name, code in MEASURES.items():
            times[name].append(cpu_seconds(code))
    for name, seconds in times.items():
        best = {"measure": name, "runs": RUNS, "cpu_s": round(statistics.median(seconds), 3)}
        print(
            json.dumps(
                {**best, "fastest_s": round(min(seconds), 3), "slowest_s": round(max(seconds), 3)}
            )
        )
    print("\nmeasure                                      CPU s")
    for name, seconds in times.items():
        print(f"{name:<44} {statistics.median(seconds):.2f}")


if __name__ == "__main__":
    main()
