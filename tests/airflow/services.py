"""Airflow on this machine, as docker-compose.yml starts it: private processes, ports and folders.

The commands are those of the compose file, so that a run proves them, too. What differs from there are
addresses and paths, which come as environment variables, and intervals, which are short here.
"""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml  # type: ignore[import-untyped]

from tests.servers import (
    LOOPBACK,
    Postgres,
    Service,
    free_ports,
    plain_environment,
    wait_for,
)

REPOSITORY = Path(__file__).parents[2]
WORKERS = ("worker-1", "worker-2")

Executor = Literal["local", "celery"]
Json = dict[str, Any]

# --- docker-compose.yml ---------------------------------------------------------------------------


def compose_command(service: str) -> list[str]:
    """The command of a service, as docker-compose.yml gives it: an explicit list of words."""
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text("utf-8"))
    command = compose["services"][service]["command"]
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise TypeError(f"docker-compose.yml: the command of {service} is no list of words: {command}")
    return command


def redis(folder: Path, port: int) -> Service:
    """A private Redis with the command of docker-compose.yml; all it keeps lies in the folder."""
    folder.mkdir()
    words = ["--bind", LOOPBACK, "--port", str(port), "--dir", str(folder)]
    return Service(
        "redis", [*compose_command("redis"), *words], plain_environment(), folder / "redis.log"
    )


# --- Airflow --------------------------------------------------------------------------------------


@dataclass
class Airflow:
    """All of Airflow's processes, and its REST API."""

    folder: Path
    executor: Executor
    settings: Mapping[str, str]
    services: dict[str, Service] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("api", "postgres", "redis", "health", "logs", "trigger logs", *WORKERS)
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.postgres = Postgres(self.folder / "postgres", self._ports["postgres"])
        self.home = self.folder / "airflow"
        self.logs = self.folder / "logs"
        self.url = f"http://{LOOPBACK}:{self._ports['api']}"
        self.environment = {
            **plain_environment(),
            **_secrets(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__CORE__EXECUTOR": f"{self.executor.capitalize()}Executor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "true",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.postgres.url,
            "AIRFLOW__API__HOST": LOOPBACK,
            "AIRFLOW__API__PORT": str(self._ports["api"]),
            "AIRFLOW__API__BASE_URL": self.url,
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(self._ports["logs"]),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(self._ports["trigger logs"]),
            "AIRFLOW__CELERY__BROKER_URL": f"redis://{LOOPBACK}:{self._ports['redis']}/0",
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "2",
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "true",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_HOST": LOOPBACK,
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_PORT": str(self._ports["health"]),
            # Short, so that a killed task is missed soon.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "5",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300",  # the DAGs do not change
            # A machine under load must not look like a broken one.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "120",
            "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "120",
            "AIRFLOW__DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": "120",
            **self.settings,
        }

    def start(self) -> None:
        """Start all and wait until all are healthy."""
        for folder in (self.home, self.logs, self.folder / "tmp"):
            folder.mkdir()
        self._start(self.postgres.made())
        self.postgres.make_database()
        if self.executor == "celery":
            self._start(redis(self.folder / "redis", self._ports["redis"]))
        self.run(compose_command("airflow-init"))
        for name in ("api-server", "scheduler", "dag-processor", "triggerer"):
            self._start(self._part(name, compose_command(name)))
        if self.executor == "celery":
            for name in WORKERS:
                self.start_worker(name)
        wait_for("Airflow is healthy", self.is_healthy, seconds=600, every=1)

    def start_worker(self, name: str) -> None:
        """Start a Celery worker (again). Two on one machine need names, in containers they have them."""
        command = [*compose_command("worker"), "--celery-hostname", name]
        ports = {"AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(self._ports[name])}
        self._start(self._part(name, command, ports))

    def is_healthy(self) -> bool:
        """Whether the API says so of all parts of it."""
        self.check()
        try:
            health = httpx.get(f"{self.url}/api/v2/monitor/health", timeout=60).json()
        except (httpx.HTTPError, ValueError):
            return False
        return all(part["status"] == "healthy" for part in health.values())

    def check(self) -> None:
        """Raises RuntimeError if one of the processes ended by itself."""
        for service in self.services.values():
            service.check()

    def run(self, command: Sequence[str]) -> str:
        """Run a command of Airflow to its end; returns what it printed.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            list(command), env=self.environment, cwd=self.folder, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with (self.logs / "commands.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def stop(self) -> None:
        """Stop all, last started first."""
        for service in reversed(self.services.values()):
            service.stop()

    def _part(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> Service:
        return Service(name, command, {**self.environment, **(more or {})}, self.logs / f"{name}.log")

    def _start(self, service: Service) -> None:
        service.start()
        self.services[service.name] = service


def _secrets() -> dict[str, str]:
    """What .env.example tells people to make."""
    fernet_key = base64.urlsafe_b64encode(os.urandom(32)).decode()
    return {
        "AIRFLOW__CORE__FERNET_KEY": fernet_key,
        "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(48),
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(48),
    }


@contextmanager
def running(airflow: Airflow) -> Iterator[Airflow]:
    """Airflow from its start to its stop, whatever happens in between."""
    try:
        airflow.start()
        yield airflow
    finally:
        airflow.stop()
