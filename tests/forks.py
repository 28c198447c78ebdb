"""Forks of a process that has imported all and opened nothing: they cost no import, and no parsing."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import date
from typing import Generic, TypeVar

from faletl.models import catalogue
from faletl.models.days import Span, restricted

T = TypeVar("T")


def parse_all_sql(*dialects: str) -> None:
    """Parse the SQL of models and checks once, for all forks."""
    span = Span(date(2026, 1, 1), date(2026, 1, 2))
    for sql in [one.sql for one in catalogue.models()] + [one.sql for one in catalogue.checks()]:
        for dialect in dialects:
            catalogue.translate(sql, dialect)
            restricted(sql, span, dialect)
    catalogue.column_comments()


class Fork(Generic[T]):
    """A process forked from this one that works, and what it made. SIGTERM is for `asked_to_stop`."""

    def __init__(self, work: Callable[[], T]) -> None:
        reading, writing = os.pipe()
        self.pid = forked()
        if self.pid:
            os.close(writing)
            self._made = os.fdopen(reading, "rb")
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            made = pickle.dumps(work())
        except BaseException:  # noqa: BLE001  # whatever it is, the parent is to tell it
            made = pickle.dumps(RuntimeError(traceback.format_exc()))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(made)
        os._exit(0)

    def result(self) -> T:
        """Wait for the end of it; raises RuntimeError with the traceback if it failed."""
        with self._made as pipe:
            made = pickle.loads(pipe.read())  # noqa: S301  # by our own fork
        os.waitpid(self.pid, 0)
        if isinstance(made, RuntimeError):
            raise made
        return made  # type: ignore[no-any-return]

    def stop(self) -> T:
        """Ask it to stop, and wait for what it made."""
        os.kill(self.pid, signal.SIGTERM)
        return self.result()


def asked_to_stop(within: float) -> bool:
    """In a fork: sleep for so long, or until it is to stop; it is when nobody waits for it any more."""
    return signal.sigtimedwait([signal.SIGTERM], within) is not None or os.getppid() == 1


def forked() -> int:
    """Fork; nothing that was printed is printed twice."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()
