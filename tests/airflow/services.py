"""Airflow on this machine, as docker-compose.yml starts it: private processes, ports and folders.

The commands are those of the compose file, so that a run proves them, too. What differs from there are
addresses and paths, which come as environment variables, and intervals, which are short here.
"""

from __future__ import annotations

import base64
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import httpx
import psutil  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

REPOSITORY = Path(__file__).parents[2]
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
LOOPBACK = "127.0.0.1"
WORKERS = ("worker-1", "worker-2")

Executor = Literal["local", "celery"]
Json = dict[str, Any]
Result = TypeVar("Result")


# --- Waiting and ports ----------------------------------------------------------------------------


def wait_for(
    what: str, found: Callable[[], Result | None], *, seconds: float, every: float = 0.5
) -> Result:
    """What `found` returns, as soon as that is neither None nor false; TimeoutError if it never is."""
    deadline = time.monotonic() + seconds
    while True:
        if result := found():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)


def free_ports(many: int) -> list[int]:
    """Ports of loopback that nobody listens on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(many)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def is_listening(port: int) -> bool:
    """Whether somebody answers on that port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


# --- Processes ------------------------------------------------------------------------------------


@dataclass
class Service:
    """A process that runs until it is stopped, with what it says in a file of its own."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it in a session of its own; what it says is added to its log."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.environment),
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **as_user(self.user),
            )

    @property
    def pids(self) -> set[int]:
        """Of the process and all that descend from it."""
        return {one.pid for one in tree_of(self.process.pid)} if self.process else set()

    def check(self) -> None:
        """Raises RuntimeError if it ended by itself."""
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with code {self.process.returncode}: see {self.log}")

    def stop(self, patience: float = 20) -> None:
        """Ask it to stop; kill what is left of it after so many seconds."""
        if self.process is None:
            return
        tree = tree_of(self.process.pid)
        self.process.send_signal(self.stop_signal)
        _, alive = psutil.wait_procs(tree, timeout=patience)
        kill(alive)
        self.process.wait()
        self.process = None

    def kill(self) -> None:
        """SIGKILL for it and all that it started, itself first, so that it cannot tell anybody."""
        if self.process is not None:
            kill(tree_of(self.process.pid))
            self.process.wait()
            self.process = None


def tree_of(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it, elders first; empty if there is none."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, in that order; who is gone already is no matter."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


class AsUser(TypedDict, total=False):
    """What makes `subprocess` run something as somebody else."""

    user: str
    group: str
    extra_groups: list[str]


def as_user(user: str | None) -> AsUser:
    """The same, for that user; nothing if that is who we are."""
    if user is None or user == getpass.getuser():
        return {}
    return {"user": user, "group": user, "extra_groups": []}


# --- docker-compose.yml ---------------------------------------------------------------------------


def compose_command(service: str) -> list[str]:
    """The command of a service, as docker-compose.yml gives it: an explicit list of words."""
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text("utf-8"))
    command = compose["services"][service]["command"]
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise TypeError(f"docker-compose.yml: the command of {service} is no list of words: {command}")
    return command


# --- PostgreSQL and Redis -------------------------------------------------------------------------


@dataclass
class Postgres:
    """A private PostgreSQL on loopback, for whoever is on this machine."""

    folder: Path
    port: int
    user: str = field(default_factory=lambda: "postgres" if os.geteuid() == 0 else getpass.getuser())

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://airflow@{LOOPBACK}:{self.port}/airflow"

    def made(self) -> Service:
        """Make the cluster; returns the server to be started."""
        self.folder.mkdir()
        shutil.chown(self.folder, self.user)  # it refuses to run as root
        self._run("initdb", "--auth=trust", "--username=airflow", "--encoding=UTF8", "--locale=C.UTF-8",
                  "--no-sync", f"--pgdata={self.folder / 'data'}")  # fmt: skip
        settings = {
            "listen_addresses": LOOPBACK,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "fsync": "off",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [postgres_program("postgres"), "-D", str(self.folder / "data"), *words]
        log = self.folder / "postgres.log"
        # SIGINT is its fast shutdown: it does not wait until all have gone.
        return Service("postgres", command, _plain(), log, self.user, signal.SIGINT)

    def make_database(self) -> None:
        """Wait until it answers, and make the database `airflow`."""
        wait_for("PostgreSQL answers", lambda: is_listening(self.port), seconds=60)
        wait_for("PostgreSQL takes a database", self._createdb, seconds=60)

    def dump(self) -> bytes:
        """All of the database, as SQL."""
        return self._run("pg_dump", *self._address, "airflow")

    def _createdb(self) -> bool:
        try:
            self._run("createdb", *self._address, "airflow")
        except subprocess.CalledProcessError:
            return False
        return True

    @property
    def _address(self) -> list[str]:
        return [f"--host={LOOPBACK}", f"--port={self.port}", "--username=airflow"]

    def _run(self, program: str, *words: str) -> bytes:
        command = [postgres_program(program), *words]
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, check=True, capture_output=True, cwd="/", env=_plain(), **as_user(self.user)
        )
        return done.stdout


def postgres_program(name: str) -> str:
    """The path of one of PostgreSQL's programs; Debian keeps most out of PATH."""
    versions = sorted(DEBIAN_POSTGRES.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"there is no {name}: install PostgreSQL")
    return found


def redis(folder: Path, port: int) -> Service:
    """A private Redis with the command of docker-compose.yml; all it keeps lies in the folder."""
    folder.mkdir()
    words = ["--bind", LOOPBACK, "--port", str(port), "--dir", str(folder)]
    return Service("redis", [*compose_command("redis"), *words], _plain(), folder / "redis.log")


def _plain() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}


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
            **_plain(),
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
