"""Private servers for tests: processes of our own on loopback, in folders of their own."""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypedDict, TypeVar

import psutil  # type: ignore[import-untyped]  # it has no types

DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
LOOPBACK = "127.0.0.1"

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


# --- PostgreSQL -------------------------------------------------------------------------


@dataclass
class Postgres:
    """A private PostgreSQL on loopback, for whoever is on this machine."""

    folder: Path
    port: int
    role: str = "airflow"
    user: str = field(default_factory=lambda: "postgres" if os.geteuid() == 0 else getpass.getuser())
    databases: list[str] = field(default_factory=list)
    service: Service | None = None
    """The process, while it is `running`."""

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://{self.role}@{LOOPBACK}:{self.port}/{self.role}"

    def new_database(self, name: str) -> str:
        """Make an empty database; its URL for everybody."""
        self._run("createdb", *self._address, name)
        self.databases.append(name)
        return f"postgresql://{self.role}@{LOOPBACK}:{self.port}/{name}"

    def made(self) -> Service:
        """Make the cluster; returns the server to be started."""
        self.folder.mkdir()
        shutil.chown(self.folder, self.user)  # it refuses to run as root
        self._run(
            "initdb", "--auth=trust", f"--username={self.role}", "--encoding=UTF8",
            "--locale=C.UTF-8", "--no-sync", f"--pgdata={self.folder / 'data'}",
        )  # fmt: skip
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
        return Service("postgres", command, plain_environment(), log, self.user, signal.SIGINT)

    def drop_databases(self) -> None:
        """Drop what `new_database` made, whoever is still connected."""
        while self.databases:
            self._run("dropdb", *self._address, "--force", self.databases.pop())

    @contextmanager
    def running(self) -> Iterator[Service]:
        """Make the cluster and serve it, until the end."""
        self.service = service = self.made()
        service.start()
        try:
            self.make_database()
            yield service
        finally:
            service.stop()
            self.service = None

    def crash(self, number: signal.Signals) -> None:
        """Have it end by that signal, and serve again."""
        assert self.service is not None
        assert self.service.process is not None
        children = tree_of(self.service.process.pid)[1:]
        self.service.process.send_signal(number)
        self.service.process.wait()
        psutil.wait_procs(children, timeout=20)  # they notice by themselves
        self.service.start()
        self.wait()

    def wait(self) -> None:
        """Until it answers queries."""
        wait_for("PostgreSQL answers again", self._answers, seconds=60, every=0.05)

    def make_database(self) -> None:
        """Wait until it answers, and make the database that has the role's name."""
        wait_for("PostgreSQL answers", lambda: is_listening(self.port), seconds=60)
        wait_for("PostgreSQL takes a database", self._createdb, seconds=60)

    def dump(self) -> bytes:
        """All of the database, as SQL."""
        return self._run("pg_dump", *self._address, self.role)

    def _answers(self) -> bool:
        try:
            self._run("psql", *self._address, "--command=select 1", self.role)
        except subprocess.CalledProcessError:
            return False
        return True

    def _createdb(self) -> bool:
        try:
            self._run("createdb", *self._address, self.role)
        except subprocess.CalledProcessError:
            return False
        return True

    @property
    def _address(self) -> list[str]:
        return [f"--host={LOOPBACK}", f"--port={self.port}", f"--username={self.role}"]

    def _run(self, program: str, *words: str) -> bytes:
        command = [postgres_program(program), *words]
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            command,
            check=True,
            capture_output=True,
            cwd="/",
            env=plain_environment(),
            **as_user(self.user),
        )
        return done.stdout


@cache
def shared_postgres() -> Postgres:
    """A server for all tests of this process; it ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="faletl-postgres-"))
    folder.chmod(0o755)  # the server runs as somebody else where tests run as root
    server = Postgres(folder / "server", free_ports(1)[0], role="faletl")
    running = server.running()
    running.__enter__()

    def stop() -> None:
        running.__exit__(None, None, None)
        shutil.rmtree(folder)

    atexit.register(stop)
    return server


@contextmanager
def pooled(server: Postgres, **settings: object) -> Iterator[str]:
    """PgBouncer in front of the server, with these settings; the host and port that it listens on."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise FileNotFoundError("there is no pgbouncer: install it")
    port = free_ports(1)[0]
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir=server.folder.parent))
    folder.chmod(0o755)  # it refuses to run as root, too
    given = {"listen_addr": LOOPBACK, "listen_port": port, "unix_socket_dir": "", "auth_type": "any"}
    file = folder / "pgbouncer.ini"
    file.write_text(
        f"[databases]\n* = host={LOOPBACK} port={server.port} user={server.role}\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in {**given, **settings}.items()),
        "utf-8",
    )
    log = folder / "pgbouncer.log"
    service = Service("pgbouncer", [program, str(file)], plain_environment(), log, server.user)
    service.start()
    try:
        wait_for("PgBouncer answers", lambda: is_listening(port), seconds=20, every=0.05)
        yield f"{LOOPBACK}:{port}"
    finally:
        service.stop()


def postgres_program(name: str) -> str:
    """The path of one of PostgreSQL's programs; Debian keeps most out of PATH."""
    versions = sorted(DEBIAN_POSTGRES.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    found = str(versions[-1]) if versions else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"there is no {name}: install PostgreSQL")
    return found


def plain_environment() -> dict[str, str]:
    """Only what a program needs to be found and to speak UTF-8."""
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
