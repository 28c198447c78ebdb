"""Child processes that cost next to nothing: forked from one that has imported all and done nothing.

They are killed, traced, or starved of memory, disk or descriptors, instead of the process of the tests.
The one they are forked from has no threads, no DuckDB and no connection: nothing that a fork spoils.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import time_machine

from faletl import cli
from faletl.config import Settings
from faletl.sandbox import FULL_KEY
from tests.servers import wait_for
from tests.truth import NOW

WARM = (
    "faletl.cli.output",
    "faletl.line.distributed",
    "faletl.pipeline",
    "faletl.operations.rebuild",
    "faletl.operations.verify",
    "faletl.warehouse.duckdb",
    "faletl.warehouse.postgres",
    "tests.conftest",
    "tests.forked",
    "tests.parsed_sql",
)


@dataclass(frozen=True)
class Child:
    """A child process, and the file of what it says on stdout and stderr."""

    process: ForkServerProcess
    said: Path

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def finish(self, seconds: float = 120) -> tuple[int, str]:
        """Wait for its end: its exit code, negative for a signal, and what it said."""
        self.process.join(seconds)
        code = self.process.exitcode
        said = self.said.read_text("utf-8")
        if code is None:
            self.process.kill()
            raise TimeoutError(f"still there after {seconds} s: {said}")
        self.process.close()
        self.said.unlink()
        return code, said


def fork(does: Callable[..., None], *given: object) -> Child:
    """Have a function, found by its name, done in a child; it ends with 0 when that returns."""
    handle, path = tempfile.mkstemp(prefix="faletl-child-")
    os.close(handle)
    process = _warm().Process(target=_child, args=(path, Path.cwd(), does, *given), daemon=True)
    process.start()
    return Child(process, Path(path))


@cache
def _warm() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    return context


def _child(said: str, folder: Path, does: Callable[..., None], *given: object) -> None:
    _print_to(said, 1, 2)
    os.chdir(folder)
    try:
        does(*given)
    except Exception:  # noqa: BLE001  # told to the parent, whatever it is
        traceback.print_exc()
        sys.exit(1)


def _print_to(path: str, *streams: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for stream in streams:
        os.dup2(descriptor, stream)
    os.close(descriptor)


# --- What may happen to it ------------------------------------------------------------------------


def suffer(*signals: signal.Signals) -> None:
    """Get these signals, each while the one before it is being obeyed."""
    try:
        os.kill(os.getpid(), signals[0])
    finally:
        if signals[1:]:
            suffer(*signals[1:])


def _be_killed() -> None:
    suffer(signal.SIGKILL)


@dataclass(frozen=True)
class Trap:
    """Have something happen before or after that call of a function (`faletl.line.replace._insert`).

    Its calls count from 1.
    """

    function: str
    when: str = "after"
    nth: int = 1
    springs: Callable[[], object] = _be_killed

    def __call__(self) -> None:
        """Set the trap."""
        owner_name, _, name = self.function.rpartition(".")
        try:
            owner: Any = importlib.import_module(owner_name)
        except ModuleNotFoundError:
            module, _, attribute = owner_name.rpartition(".")
            owner = getattr(importlib.import_module(module), attribute)
        original, numbers = getattr(owner, name), itertools.count(1)

        def trapped(*given: Any, **named: Any) -> Any:
            is_chosen = next(numbers) == self.nth
            if is_chosen and self.when == "before":
                self.springs()
            result = original(*given, **named)
            if is_chosen and self.when == "after":
                self.springs()
            return result

        setattr(owner, name, trapped)


def be_traced() -> None:
    """Wait for a tracer (`traced`)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1))  # by anybody, where Yama asks
    wait_for("a tracer comes", lambda: _is_traced("self"), seconds=60, every=0.01)


@contextmanager
def traced(child: Child, *expressions: str, log: Path = Path(os.devnull)) -> Iterator[None]:
    """Have strace watch, or interfere with, a child that waits to be traced."""
    words = [word for expression in expressions for word in ("-e", expression)]
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), *words, "-p", str(child.pid)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
        yield
        tracer.wait(120)


def _is_traced(process: str) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{process}/status").read_text("utf-8")


_PR_SET_PTRACER = 0x59616D61

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


# --- The command line -----------------------------------------------------------------------------


def start(settings: Settings, *first: Callable[[], None], command: str = "run", **more: str) -> Child:
    """A command of faletl in a child, with the clock of the tests, after what is to be done there first.

    `more` is of its environment; CLOCK there sets the clock.
    """
    clock = more.get("CLOCK", NOW)
    return fork(_command, environment(settings, **more), command.split(), clock, first)


def called(
    words: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """What a command of faletl in that folder ended with and printed; CLOCK sets its clock."""
    with tempfile.TemporaryDirectory(prefix="faletl-called-") as name:
        printed = [Path(name) / "stdout", Path(name) / "stderr"]
        child = fork(_called, dict(environment), list(words), folder, printed)
        code, said = child.finish(180)
        assert not said
        out, err = (path.read_text("utf-8") for path in printed)
    return subprocess.CompletedProcess(words, code, out, err)


def _called(
    environment: Mapping[str, str], words: Sequence[str], folder: Path, printed: Sequence[Path]
) -> None:
    for stream, path in enumerate(printed, start=1):
        _print_to(str(path), stream)
    os.chdir(folder)
    _command(environment, words, environment.get("CLOCK"))


def _command(
    environment: Mapping[str, str],
    words: Sequence[str],
    clock: datetime | str | None,
    first: Sequence[Callable[[], None]] = (),
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # that of its own environment
    for one in first:
        one()
    sys.argv = ["faletl", *words]
    with time_machine.travel(clock, tick=True) if clock else nullcontext():
        cli.main()


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The settings as a process gets them."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": tempfile.gettempdir(),
        "FAL_KEY": FULL_KEY,
        "FALETL_API_URL": settings.api_url,
        "FALETL_WAREHOUSE": settings.warehouse,
        "FALETL_LANDING": settings.landing,
        "FALETL_FIRST_DAYS": "2",
        "FALETL_RATE": "0",
        "FALETL_GATE": str(int(settings.gate)),
        **more,
    }
