"""The models of sql/, built by faletl and by dbt: in full, and one more day.

    python -m benchmarks.dbt_build 1000000 5000000

There are two copies of one warehouse, filled by SQL (benchmarks/history.py). dbt gets the same
selects: a model by day is incremental (delete+insert of the days), with the select restricted to
the day as in faletl; views are views, all others tables. Both may use the same memory and two
threads. faletl also runs its checks, dbt runs no tests. Medians of three rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb

from benchmarks import ours
from benchmarks.history import A_DAY, NEXT, fill
from benchmarks.measure import Spent, environment_of, faletl, figures, median, print_results, spent
from faletl.config import Settings
from faletl.models.catalogue import Model, models
from faletl.models.days import Span, is_by_day, restricted

ROUNDS = 3
PACKAGES = ("dbt-core<1.12", "dbt-duckdb<1.12", f"duckdb=={duckdb.__version__}")
PROJECT = """
name: spend
version: 1.0.0
profile: spend
model-paths: [models]
macro-paths: [macros]
flags: {send_anonymous_usage_stats: false}
"""
PROFILES = """
spend:
  target: bench
  outputs:
    bench:
      type: duckdb
      path: %s
      schema: main
      threads: 2
      settings: {TimeZone: UTC, memory_limit: 256MB, threads: 2}
"""
SCHEMAS = "{% macro generate_schema_name(name, node) %}{{ name or target.schema }}{% endmacro %}"


def write_project(folder: Path, database: Path) -> None:
    """Write a dbt project of our models for the database."""
    (folder / "models").mkdir(parents=True)
    (folder / "macros").mkdir()
    (folder / "dbt_project.yml").write_text(PROJECT)
    (folder / "profiles.yml").write_text(PROFILES % database)
    (folder / "macros" / "schemas.sql").write_text(SCHEMAS)
    for model in models():
        (folder / "models" / f"{model.name}.sql").write_text(_dbt_model(model))


def _dbt_model(model: Model) -> str:
    whole = _with_refs(model.sql)
    if model.is_view or not is_by_day(model):
        kind = "view" if model.is_view else "table"
        return f"{{{{ config(materialized='{kind}', schema='{model.layer}') }}}}\n{whole}"
    a_day = _with_refs(restricted(model.sql, Span(date(2000, 1, 1), date(2000, 1, 2))))
    a_day = a_day.replace("2000-01-01", "{{ var('day') }}").replace("2000-01-02", "{{ var('next') }}")
    return (
        f"{{{{ config(materialized='incremental', incremental_strategy='delete+insert', "
        f"unique_key='{model.day}', schema='{model.layer}') }}}}\n"
        f"{{% if is_incremental() %}}\n{a_day}\n{{% else %}}\n{whole}\n{{% endif %}}\n"
    )


def _with_refs(sql: str) -> str:
    known = {model.table for model in models()}
    name = re.compile(r'"?(staging|marts|reports)"?\."?(\w+)"?')
    return name.sub(lambda m: f"{{{{ ref('{m[2]}') }}}}" if f"{m[1]}.{m[2]}" in known else m[0], sql)


def _without_models(database: Path) -> None:
    with duckdb.connect(str(database)) as connection:
        for model in reversed(models()):
            connection.execute(f"drop {'view' if model.is_view else 'table'} {model.table}")


def row_counts(database: Path) -> dict[str, Any]:
    """Return the number of rows of each model."""
    with duckdb.connect(str(database), read_only=True) as connection:
        connection.execute("set TimeZone = 'UTC'")
        return {
            model.table: connection.execute(f"select count(*) from {model.table}").fetchone()
            for model in models()
        }


def measured(rows: int, python: Path) -> Iterator[dict[str, Any]]:
    """Yield the results for a history of `rows` charges."""
    with tempfile.TemporaryDirectory(prefix="faletl-bench-") as name:
        folder = Path(name)
        environment = ours.environment("http://127.0.0.1:1/v1", folder)
        ours_file, dbt_file = folder / "warehouse.duckdb", folder / "dbt.duckdb"
        account, days = environment["FALETL_ACCOUNT"], rows // A_DAY

        def add_days(first: date, count: int) -> None:
            for database in (ours_file, dbt_file) if dbt_file.exists() else (ours_file,):
                fill(Settings.isolated(warehouse=f"duckdb:///{database}"), account, first, count, A_DAY)

        def by_dbt(*words: str) -> Spent:
            where = ["--project-dir", str(project), "--profiles-dir", str(project)]
            return spent([python.with_name("dbt"), "run", *words, *where], {"HOME": str(folder)})

        add_days(NEXT - timedelta(days=days), days)
        spent(faletl("build", "--full"), environment)
        shutil.copyfile(ours_file, dbt_file)
        _without_models(dbt_file)
        project = folder / "project"
        write_project(project, dbt_file)
        results: dict[tuple[str, str], list[Spent]] = {}
        for number in range(ROUNDS):
            full = spent(faletl("build", "--full"), environment)
            results.setdefault(("full build", "faletl"), []).append(full)
            results.setdefault(("full build", "dbt"), []).append(by_dbt("--full-refresh"))
            day = NEXT + timedelta(days=number)
            add_days(day, 1)
            results.setdefault(("one more day", "faletl"), []).append(
                spent(faletl("build"), environment)
            )
            vars_ = json.dumps({"day": f"{day}", "next": f"{day + timedelta(days=1)}"})
            results.setdefault(("one more day", "dbt"), []).append(by_dbt("--vars", vars_))
            assert row_counts(ours_file) == row_counts(dbt_file)
        for (work, tool), runs in results.items():
            yield {"work": work, "charges": rows, "tool": tool, **figures(median(runs))}


def main() -> None:
    """Run the benchmark that the module describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=int, nargs="+", help="charges in the history")
    parser.add_argument("--python", type=Path, help="Python of an environment with dbt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faletl-dbt-") as name:
        python = arguments.python or environment_of(Path(name) / "dbt", PACKAGES)
        print_results([line for rows in arguments.rows for line in measured(rows, python)])


if __name__ == "__main__":
    main()
