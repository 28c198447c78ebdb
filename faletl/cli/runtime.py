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
    """Options that come before the command."""

    debug = False
    log_format = "text"


def run_command(app: typer.Typer) -> int:
    """Run the command line; every error becomes a sentence and an exit code."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone, so no message can reach it
        return 1
    except TyperException as error:
        text = error.format_message()
        if text.startswith("Usage:"):  # no command was given
            sys.stderr.write(f"{text}\n")
        else:
            print_stderr(f"{text.rstrip('.')}; see faletl --help")
        return UsageError.exit_code
    except (FaletlError, Stopped, Exception) as error:  # noqa: BLE001  # a bug of ours, too
        if signals:  # main reports them; DuckDB, for one, raises its own error for an interrupted query
            return 1
        if isinstance(error, OSError):
            with suppress(OSError):
                sys.stdout.close()  # stdout itself may be full, with text still in its buffer
        shown = as_faletl_error(error)
        print_error(shown)
        return shown.exit_code if isinstance(shown, FaletlError) else 1
    return int(code or 0)


def as_faletl_error(error: BaseException) -> BaseException:
    """Return a FaletlError if the system refused something, as that is no bug; else the error."""
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return ExhaustedError(
            "the process is out of memory or threads; raise its limit, or lower FALETL_PARALLEL, "
            "FALETL_MEMORY or FALETL_MAX_BODY"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"the system refused{where}: {error.strerror}")
    return error


signals: list[int] = []


def on_signal(number: int, _frame: object) -> NoReturn:
    """Stop in an orderly way at the first signal, at once at the second."""
    if signals:
        os._exit(128 + number)
    signals.append(number)
    raise Stopped


def print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"faletl {__version__}")
        raise typer.Exit


def report_and_exit(
    report: Report, *, quiet: bool = False, nothing: str = "nothing to do: no window was due"
) -> NoReturn:
    """Print results to stdout and failures to stderr; exit with the report's code."""
    if not quiet:
        for sentence in list(_sentences(report)) or [nothing] * (report.exit_code == 0):
            typer.echo(sentence)
    for error, windows in _alike(report.failures):
        print_error(error, windows)
    raise typer.Exit(report.exit_code)


def _alike(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[FaletlError, list[str]]]:
    """Yield each distinct failure, with the windows that failed in that way, in order of time."""
    groups: dict[tuple[type[FaletlError], str], tuple[FaletlError, list[Task]]] = {}
    for task, error in _with_damage_as_one(failures):
        first, tasks = groups.setdefault((type(error), error.message), (error, []))
        if task is not None:
            tasks.append(task)
    for first, tasks in groups.values():
        ordered = sorted(tasks, key=lambda task: task.window)
        yield first, [f"{task.resource.name} {task.window}" for task in ordered]


def _with_damage_as_one(
    failures: Iterable[tuple[Task | None, FaletlError]],
) -> Iterator[tuple[Task | None, FaletlError]]:
    """Yield the failures; all damaged extracts become one failure, at the place of the first."""
    all_failures = list(failures)
    damaged = [error for _, error in all_failures if isinstance(error, DamagedExtractError)]
    for task, error in all_failures:
        if not isinstance(error, DamagedExtractError):
            yield task, error
        elif error is damaged[0]:
            total = DamagedExtractError.of_many(error, len(damaged))
            yield (task if total is error else None), total


def _sentences(report: Report) -> Iterator[str]:
    for name in RESOURCES:
        outcomes = [outcome for outcome in report.outcomes if outcome.resource == name]
        if outcomes:
            counts = {
                kind: sum(o.outcome == kind for o in outcomes)
                for kind in dict.fromkeys(o.outcome for o in outcomes)
            }
            summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            rows = sum(o.rows for o in outcomes)
            windows = "window" if len(outcomes) == 1 else "windows"
            yield f"{name}: {len(outcomes)} {windows} ({summary}), {rows:,} rows"
    if report.build:
        yield f"built {report.build.days:,} days; {report.build.checks} checks passed"
        if report.build.runaways:
            charges = "charge" if report.build.runaways == 1 else "charges"
            yield f"{report.build.runaways:,} new runaway {charges}: see reports.rpt_runaway_requests"
    if report.published:
        yield f"published {report.published}"


def print_error(error: BaseException, windows: Sequence[str] = ()) -> None:
    """Print an error on one line; if several windows failed with it, their number, first and last."""
    if Options.debug:
        logging.getLogger("faletl").error("failed", exc_info=error)
    if not isinstance(error, FaletlError):
        # The text of a foreign exception may contain a secret, so only its name is printed.
        print_stderr(f"unexpected {type(error).__name__}: this is a bug of faletl; --debug shows where")
    elif Options.log_format == "json":
        span = {"windows": len(windows), "first": windows[0], "last": windows[-1]} if windows else {}
        with suppress(OSError):
            sys.stderr.write(json.dumps({**error.as_dict(), **span}) + "\n")
    elif len(windows) > 1:
        print_stderr(f"{len(windows)} windows, {windows[0]} to {windows[-1]}: {error.sentence}")
    else:
        print_stderr(str(error))


def print_stderr(sentence: str) -> None:
    with suppress(OSError):  # a closed stderr must not fail the command
        sys.stderr.write(f"faletl: {sentence}\n")


class _Stderr(logging.Handler):
    """Write to the current sys.stderr, which a progress bar replaces while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk behind stderr must not stop the run
            sys.stderr.write(self.format(record) + "\n")


class JsonLines(logging.Formatter):
    """Format each record as one line with a JSON object."""

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
    # Without a handler they would print a traceback when a signal interrupts a connection.
    for name in ("sqlalchemy", "great_expectations"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    # On a terminal a bar shows the progress; elsewhere each window is a log line.
    quiet = sys.stderr.isatty() and not is_json and not Options.debug
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar on a terminal; elsewhere log lines show the progress."""
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
