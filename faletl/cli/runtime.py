"""How a command runs: signals, errors, exit codes, logs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import typer
from typer.exceptions import TyperException

from faletl import __version__
from faletl.errors import DamagedExtractError, ExhaustedError, FaletlError, StorageError, UsageError
from faletl.resources import RESOURCES

if TYPE_CHECKING:
    from faletl.line.plan import Task
    from faletl.line.report import Progress, Report


class Stopped(BaseException):
    """Ctrl-C, or a request to terminate."""


class Options:
    """What the options before the command say."""

    debug = False
    log_format = "text"


def run_command(app: typer.Typer) -> int:
    """Run the command line; every error becomes a sentence and an exit code."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; nothing is left to be said
        return 1
    except TyperException as error:
        text = error.format_message()
        if text.startswith("Usage:"):  # no command was given
            sys.stderr.write(f"{text}\n")
        else:
            say(f"{text.rstrip('.')}; see faletl --help")
        return UsageError.exit_code
    except (FaletlError, Stopped, Exception) as error:  # noqa: BLE001  # a bug of ours, too
        if signals:  # told by main; DuckDB, say, makes an error of its own of an interrupted query
            return 1
        if isinstance(error, OSError):
            with suppress(OSError):
                sys.stdout.close()  # it may be stdout that takes no more, of what it holds still
        told = _of_the_system(error)
        _tell_error(told)
        return told.exit_code if isinstance(told, FaletlError) else 1
    return int(code or 0)


def _of_the_system(error: BaseException) -> BaseException:
    """An error of ours for what the system refused, which is no bug; any other as it is."""
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return ExhaustedError(
            "there is no memory left for this; raise its limit, or lower FALETL_PARALLEL, FALETL_MEMORY "
            "or FALETL_MAX_BODY"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"the system refused{where}: {error.strerror}")
    return error


signals: list[int] = []


def on_signal(number: int, _frame: object) -> NoReturn:
    """Stop in good order at the first signal, at once at the second."""
    if signals:
        os._exit(128 + number)
    signals.append(number)
    raise Stopped


def print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"faletl {__version__}")
        raise typer.Exit


def finish(
    report: Report, *, quiet: bool = False, nothing: str = "nothing to do: no window was due"
) -> NoReturn:
    """Tell what was done on stdout and what failed on stderr; end with the report's exit code."""
    if not quiet:
        for sentence in list(_sentences(report)) or [nothing] * (report.exit_code == 0):
            typer.echo(sentence)
    for error, windows in _alike(report.failures):
        _tell_error(error, windows)
    raise typer.Exit(report.exit_code)


def _alike(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[FaletlError, list[str]]]:
    """Each failure once, with the windows that failed in the same way, in order of time."""
    found: dict[tuple[type[FaletlError], str], tuple[FaletlError, list[Task]]] = {}
    for task, error in _with_damage_as_one(failures):
        first, tasks = found.setdefault((type(error), error.message), (error, []))
        if task is not None:
            tasks.append(task)
    for first, tasks in found.values():
        ordered = sorted(tasks, key=lambda task: task.window)
        yield first, [f"{task.resource.name} {task.window}" for task in ordered]


def _with_damage_as_one(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[Task | None, FaletlError]]:
    """The failures, with one for all extracts that are damaged, at its first place."""
    every = list(failures)
    damaged = [error for _, error in every if isinstance(error, DamagedExtractError)]
    for task, error in every:
        if not isinstance(error, DamagedExtractError):
            yield task, error
        elif error is damaged[0]:
            one = DamagedExtractError.of_many(error, len(damaged))
            yield (task if one is error else None), one


def _sentences(report: Report) -> Iterator[str]:
    for name in RESOURCES:
        mine = [outcome for outcome in report.outcomes if outcome.resource == name]
        if mine:
            counts = {
                kind: sum(o.outcome == kind for o in mine)
                for kind in dict.fromkeys(o.outcome for o in mine)
            }
            told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            rows = sum(o.rows for o in mine)
            windows = "window" if len(mine) == 1 else "windows"
            yield f"{name}: {len(mine)} {windows} ({told}), {rows:,} rows"
    if report.build:
        yield f"built {report.build.days:,} days anew; {report.build.checks} checks found nothing"
        if report.build.runaways:
            charges = "charge" if report.build.runaways == 1 else "charges"
            yield f"{report.build.runaways:,} new runaway {charges}: see reports.rpt_runaway_requests"
    if report.published:
        yield f"published {report.published}"


def _tell_error(error: BaseException, windows: Sequence[str] = ()) -> None:
    """Report an error on one line; where several windows failed so, their number, first and last."""
    if Options.debug:
        logging.getLogger("faletl").error("failed", exc_info=error)
    if not isinstance(error, FaletlError):
        # The text of a foreign exception may hold anything, so only its name is told.
        say(f"unexpected {type(error).__name__}: this is a bug of faletl; --debug shows where")
    elif Options.log_format == "json":
        many = {"windows": len(windows), "first": windows[0], "last": windows[-1]} if windows else {}
        with suppress(OSError):
            sys.stderr.write(json.dumps({**error.as_dict(), **many}) + "\n")
    elif len(windows) > 1:
        say(f"{len(windows)} windows, {windows[0]} to {windows[-1]}: {error.sentence}")
    else:
        say(str(error))


def say(sentence: str) -> None:
    with suppress(OSError):  # there is nobody else to tell
        sys.stderr.write(f"faletl: {sentence}\n")


class _Stderr(logging.Handler):
    """Writes to what stderr is now: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk below the log is no reason to stop
            sys.stderr.write(self.format(record) + "\n")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging() -> None:
    handler = _Stderr()
    is_json = Options.log_format == "json"
    handler.setFormatter(JsonLines() if is_json else logging.Formatter("%(message)s"))
    logger = logging.getLogger("faletl")
    logger.handlers, logger.propagate = [handler], False
    # Without a handler of its own it would show a traceback when a signal cuts a connection short.
    for name in ("sqlalchemy", "great_expectations"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    # On a terminal the bar tells the progress; elsewhere each window is one line.
    quiet = sys.stderr.isatty() and not is_json and not Options.debug
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere the log lines tell."""
    if not sys.stderr.isatty() or Options.log_format == "json":
        yield lambda _what, _done, _of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
