"""Outputs in the documents: commands and queries are run against the demo, at a fixed time."""

from __future__ import annotations

import atexit
import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import time_machine

from faletl.cli import demo
from faletl.cli.output import print_query
from faletl.config import Settings
from faletl.line.report import no_progress

SHOWN_AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
FOLDER = Path(__file__).parent

_QUERY = re.compile(r"```sql\n(?P<sql>.*?)```\n(\n```text\n.*?```\n)?", re.DOTALL)
_SCRIPT = re.compile(r"(?P<script>```python\n(?P<code>.*?)```\n)\n```text\n.*?```\n", re.DOTALL)
_COMMAND = re.compile(r'(?P<line>\$ faletl sql "(?P<sql>[^"]+)"\n)(?:[^$`\n].*\n)+')  # and its output
_FIRST_ANSWERS = re.compile(r"(?<=```text\n)[^`]*? USD from .*?(?=```)", re.DOTALL)

_SHOWN_DAYS = 4
_SHOWN_ROWS = 2


def queries() -> str:
    """Return docs/queries.md with the output of each query."""
    page = (FOLDER / "queries.md").read_text("utf-8")
    return _QUERY.sub(
        lambda match: f"```sql\n{match['sql']}```\n\n```text\n{_rows(match['sql'])}```\n", page
    )


def bi() -> str:
    """Return docs/bi.md with the output of each script that has one."""
    page = (FOLDER / "bi.md").read_text("utf-8")
    return _SCRIPT.sub(
        lambda match: f"{match['script']}\n```text\n{_script_output(match['code'])}```\n", page
    )


def readme() -> str:
    """Return README.md with the first answers of the demo, and the output of each query."""
    page = (FOLDER.parent / "README.md").read_text("utf-8")
    return outputs(_FIRST_ANSWERS.sub(lambda _: "".join(_excerpt(_first_answers())), page))


def outputs(page: str) -> str:
    """Return the page with the output of each `faletl sql` in it."""
    return _COMMAND.sub(lambda match: match["line"] + _rows(match["sql"]), page)


def _rows(sql: str) -> str:
    """Return the output of `faletl sql`."""
    return _printed(lambda: print_query(warehouse(), sql, "table"))


def _script_output(code: str) -> str:
    """Return the output of the Python code, run in the folder of the warehouse."""
    with contextlib.chdir(Path(warehouse().warehouse.removeprefix("duckdb:///")).parent):
        return _printed(lambda: exec(code, {}))  # noqa: S102  # the code is from our own document


def _first_answers() -> str:
    return _printed(lambda: demo.print_first_answers(warehouse()))


def _excerpt(output: str) -> Iterator[str]:
    """Yield the total, the last days, and the first rows of each answer."""
    total, days, *tables, _try_next = output.strip("\n").split("\n\n")
    yield f"{total}\n\n"
    yield "\n".join(days.splitlines()[-_SHOWN_DAYS:]) + "\n"
    for table in tables:
        question, header, *rows = table.splitlines()
        more = ["…"] if len(rows) > _SHOWN_ROWS else []
        yield "\n" + "\n".join([question, header, *rows[:_SHOWN_ROWS], *more]) + "\n"


def _printed(show: Callable[[], None]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        show()
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


@cache
def warehouse() -> Settings:
    """Return settings of the demo's warehouse, which is made once."""
    folder = Path(tempfile.mkdtemp(prefix="faletl-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with time_machine.travel(SHOWN_AT, tick=True):  # two price lists need two instants
        settings, report = demo.run(folder, no_progress)
    if report.exit_code:
        raise RuntimeError(report.failures)
    return settings
