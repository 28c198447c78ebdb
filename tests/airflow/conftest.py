"""An Airflow of its own for each test: a metadata database in SQLite, run by processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from faletl.sandbox import FULL_KEY, Sandbox, invented_world
from tests import truth
from tests.truth import Account

DAGS = Path(__file__).parents[2] / "dags"
RUN_DAGS = "from tests.airflow.run_dags import main; main()"


class Warm:
    """A process that has Airflow imported, and forks (tests/airflow/warm.py)."""

    def __init__(self, home: Path) -> None:
        with (home / "warm.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.airflow.warm"],
                env=plain_environment() | environment(home),
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, **what: Any) -> int:
        """Send a request; returns what it is answered with."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


@dataclass
class Airflow:
    """An Airflow with the DAGs of the project; `env` is what its processes get."""

    home: Path
    warm: Warm
    env: dict[str, str] = field(default_factory=dict)

    def connect(
        self, url: str, key: str = FULL_KEY, connection: str = "fal_default", **extra: Any
    ) -> None:
        """Make the connection to fal, as an environment variable."""
        made = {"conn_type": "fal", "password": key, "host": url, "extra": {"rate": 0, **extra}}
        self.env[f"AIRFLOW_CONN_{connection.upper()}"] = json.dumps(made)

    def start(self, code: str, *argv: str, **more: str) -> int:
        """Run Python code in a process of this Airflow; returns its pid."""
        env = {**plain_environment(), **self.env, **more}
        return self.warm.ask(
            code=code, argv=argv, env=env, home=str(self.home), output=str(self.home / "said.log")
        )

    def finish(self, pid: int) -> int:
        """Wait until the process has ended; returns its exit code."""
        return self.warm.ask(wait=pid)

    def run(self, code: str, *argv: str, **more: str) -> str:
        """Run Python code in a process of this Airflow, to a good end; returns what it said."""
        told = self.home / "said.log"
        before = len(told.read_text("utf-8")) if told.exists() else 0
        ended = self.finish(self.start(code, *argv, **more))
        said = told.read_text("utf-8")[before:]
        assert ended == 0, said[-6000:]
        return said

    def test(self, *asked: str | dict[str, Any], before: str = "", **more: str) -> list[dict[str, Any]]:
        """Run DAGs one after another, by name or as run_dags.py takes them; what became of each.

        `before` is code that runs first. What they said stands in `log` of the last.
        """
        full = [{"dag_id": one} if isinstance(one, str) else one for one in asked]
        said = self.run(f"{before}\n{RUN_DAGS}", json.dumps(full), **more)
        results: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
        results[-1]["log"] = said
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
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Airflow, imported."""
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.stop()


@pytest.fixture(scope="session")
def migrated(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty metadata database."""
    home = tmp_path_factory.mktemp("migrated")
    Airflow(home, warm, environment(home)).run("from airflow.utils.db import initdb; initdb()")
    return home / "airflow.db"


@pytest.fixture
def airflow(warm: Warm, migrated: Path, tmp_path: Path) -> Airflow:
    """An Airflow that nothing ran in yet."""
    shutil.copyfile(migrated, tmp_path / "airflow.db")
    return Airflow(tmp_path, warm, environment(tmp_path))


def few() -> Account:
    """An account with a few lines of usage on each of some days, up to yesterday."""
    today = datetime.combine(datetime.now(UTC).date(), time(7), UTC)
    account = truth.two_days()
    account.lines = [
        truth.line(today - timedelta(days=days), endpoint, f"{days}.5")
        for days in (1, 2, 3, 11, 12, 20)
        for endpoint in (truth.FLUX, truth.VIDEO, truth.VOICE)
    ]
    return account


@pytest.fixture(scope="session")
def served() -> Iterator[Sandbox]:
    """The small account, served to all tests that do not change it."""
    with Sandbox(few(), page_size=4) as server:
        yield server


@pytest.fixture(scope="session")
def invented() -> Iterator[Sandbox]:
    """The invented account of `faletl sandbox`, up to now."""
    with Sandbox(invented_world(7)) as server:
        yield server


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[Any]]]:
    """A webhook's URL, and what was posted to it; below /gone it takes nothing."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            posted.append(json.loads(body))
            self.send_response(404 if self.path.startswith("/gone") else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()
    thread.join()


def plain_environment() -> dict[str, str]:
    """What any process needs."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}


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
