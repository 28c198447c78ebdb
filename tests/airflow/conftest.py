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

from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox, invented_world
from tests import truth
from tests.conftest import settings_for
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
    """An Airflow with those DAGs of the project that are asked for; `env` is what its processes get."""

    home: Path
    warm: Warm
    env: dict[str, str] = field(default_factory=dict)

    def connect(
        self,
        url: str,
        key: str = FULL_KEY,
        connection: str = "fal_default",
        *,
        is_split: bool = False,
        **extra: Any,
    ) -> None:
        """Make the connection to fal, as an environment variable; the key may be split at its colon."""
        login, password = key.split(":", 1) if is_split else ("", key)
        made = {
            "conn_type": "fal",
            "login": login,
            "password": password,
            "host": url,
            "extra": {"rate": 0, **extra},
        }
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

    def cold(self, code: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process that has imported nothing yet, and knows of no fal."""
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**plain_environment(), **self.env, **more},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def test(self, *asked: str | dict[str, Any], before: str = "", **more: str) -> list[dict[str, Any]]:
        """Run DAGs one after another, by name or as run_dags.py takes them; what became of each.

        `before` is code that runs first. What they said stands in `log` of the last.
        """
        full = [{"dag_id": one} if isinstance(one, str) else one for one in asked]
        for one in full:  # dag.test() parses all DAGs of the folder, and writes them into the database
            self._take_in(DAGS / f"{one['dag_id'].partition('__')[0]}.py")
        said = self.run(f"{before}\n{RUN_DAGS}", json.dumps(full), **more)
        results: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
        results[-1]["log"] = said
        return results

    def _take_in(self, file: Path) -> None:
        link = self.home / "dags" / file.name
        if file.exists() and not link.exists():
            link.symlink_to(file)

    def forget(self, migrated: Path) -> None:
        """Lose all that Airflow knows: its metadata database is as new."""
        for file in self.home.glob("airflow.db*"):
            file.unlink()
        shutil.copyfile(migrated, self.home / "airflow.db")

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
    (tmp_path / "dags").mkdir()
    return Airflow(tmp_path, warm, environment(tmp_path, tmp_path / "dags"))


def settings_of(airflow: Airflow, url: str = "http://127.0.0.1:1") -> Settings:
    """The same warehouse and landing folder, for this process."""
    warehouse, landing = (airflow.env[f"FALETL_{name}"] for name in ("WAREHOUSE", "LANDING"))
    return settings_for(url, airflow.home, warehouse=warehouse, landing=landing)


def few() -> Account:
    """An account with a few lines of usage on each of some days, up to yesterday."""
    today = datetime.combine(datetime.now(UTC).date(), time(7), UTC)
    account = truth.two_days()
    account.lines = [
        truth.line(today - timedelta(days=days), endpoint, f"{days}.5")
        for days in (1, 2, 3, 11, 12, 20)
        for endpoint in (truth.FLUX, truth.VIDEO, truth.VOICE)
    ]
    for number in range(50):  # so that prices are asked for in two batches
        account.catalogue.append({"endpoint_id": f"fal-ai/other-{number}"})
        account.list_price(f"fal-ai/other-{number}", "0.01")
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


def environment(home: Path, dags: Path = DAGS) -> dict[str, str]:
    """What its processes get."""
    return {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
        "FALETL_WAREHOUSE": f"duckdb:///{home / 'warehouse' / 'faletl.duckdb'}",
        "FALETL_LANDING": str(home / "landing"),
        "FALETL_FIRST_DAYS": "2",
        "FALETL_GATE": "0",
    }
