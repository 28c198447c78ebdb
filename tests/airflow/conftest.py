"""An Airflow of its own for each test: a metadata database in SQLite, run by processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import pytest

from faletl.sandbox import FULL_KEY, Sandbox, invented_world

DAGS = Path(__file__).parents[2] / "dags"


@dataclass
class Airflow:
    """An Airflow with the DAGs of the project; `env` is what its processes get."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)

    def connect(
        self, url: str, key: str = FULL_KEY, connection: str = "fal_default", **extra: Any
    ) -> None:
        """Make the connection to fal, as an environment variable."""
        made = {"conn_type": "fal", "password": key, "host": url, "extra": {"rate": 0, **extra}}
        self.env[f"AIRFLOW_CONN_{connection.upper()}"] = json.dumps(made)

    def python(self, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python in this Airflow."""
        return subprocess.run(
            [sys.executable, *args],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(sys.path),
                **self.env,
                **more,
            },
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def test(self, *asked: str | dict[str, Any], **more: str) -> list[dict[str, Any]]:
        """Run DAGs one after another, by name or as run_dags.py takes them; what became of each.

        What they said stands in `log` of the last.
        """
        full = [{"dag_id": one} if isinstance(one, str) else one for one in asked]
        done = self.python("-m", "tests.airflow.run_dags", json.dumps(full), **more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        results[-1]["log"] = done.stdout + done.stderr
        return results

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the metadata database."""
        connection = sqlite3.connect(self.home / "airflow.db")
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    @property
    def warehouse(self) -> str:
        """FALETL_WAREHOUSE."""
        return self.env["FALETL_WAREHOUSE"]


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty metadata database, made once for all workers of the test run."""
    shared = tmp_path_factory.getbasetemp().parent / "airflow-migrated"
    with filelock.FileLock(f"{shared}.lock"):
        if not (shared / "airflow.db").exists():
            shared.mkdir(exist_ok=True)
            done = Airflow(shared, environment(shared)).python("-m", "airflow", "db", "migrate")
            assert done.returncode == 0, done.stderr
    return shared / "airflow.db"


@pytest.fixture
def airflow(migrated: Path, tmp_path: Path) -> Airflow:
    """An Airflow that nothing ran in yet."""
    shutil.copyfile(migrated, tmp_path / "airflow.db")
    return Airflow(tmp_path, environment(tmp_path))


@pytest.fixture(scope="session")
def invented() -> Iterator[Sandbox]:
    """The invented account of `faletl sandbox`, up to now."""
    with Sandbox(invented_world(7)) as server:
        yield server


def environment(home: Path) -> dict[str, str]:
    """What its processes get."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "FALETL_WAREHOUSE": f"duckdb:///{home / 'warehouse' / 'faletl.duckdb'}",
        "FALETL_LANDING": str(home / "landing"),
        "FALETL_FIRST_DAYS": "2",
        "FALETL_GATE": "0",
    }
