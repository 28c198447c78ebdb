"""The start time of commands and of Airflow's parsing of `dags/`, compared with unavoidable imports.

    python -m benchmarks.start

Each line is its own process; medians of seven rounds, with cached byte code. Unavoidable are, for
`--help`, the command-line library; for `status` also SQLAlchemy with DuckDB and the settings; for
DAGs Airflow's SDK, which the processor has imported before it parses a file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Spent, faletl, figures, print_results, side_by_side, spent

ROUNDS = 7
DAGS = Path(__file__).parents[1] / "dags"
NAMES = (
    "Asset, BaseHook, BaseNotifier, CronDataIntervalTimetable, DAG, Param, RetryPolicy, TaskGroup, task"
)
CODE = {
    "python": "pass",
    "import typer, rich": "import typer.main, rich.console",
    "import what status needs": (
        "import typer.main, rich.console, duckdb, sqlalchemy, duckdb_sqlalchemy, pydantic_settings"
    ),
    "import airflow.sdk": f"from airflow.sdk import {NAMES}; task.sensor; Asset('x://y')",
    "parse dags/": f"""
import runpy
from pathlib import Path
for path in sorted(Path({str(DAGS)!r}).glob("*.py")):
    runpy.run_path(str(path))
""",
}


def main() -> None:
    """Run the benchmark that the module describes."""
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as folder:
        environment = {"HOME": folder, "FALETL_WAREHOUSE": f"duckdb:///{folder}/warehouse.duckdb"}

        def python(code: str) -> Spent:
            return spent([sys.executable, "-c", code], environment)

        imports = (
            "from faletl.config import Settings; from faletl.warehouse import open_warehouse as o\n"
        )
        python(f"{imports}with o(Settings()).lease('bench'): pass")
        variants = {name: (lambda code=code: python(code)) for name, code in CODE.items()}
        variants["faletl --help"] = lambda: spent(faletl("--help"), environment)
        variants["faletl status"] = lambda: spent(faletl("status"), environment)
        results = side_by_side(variants, ROUNDS)
    order = [
        "python", "import typer, rich", "faletl --help", "import what status needs", "faletl status",
        "import airflow.sdk", "parse dags/",
    ]  # fmt: skip
    print_results({"work": name, **figures(results[name])} for name in order)


if __name__ == "__main__":
    main()
