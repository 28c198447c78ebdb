"""docs/bi.md: its commands for PostgreSQL, and when readers of the file see what is new.

Its scripts for DuckDB are run, and their output compared, with the other documents.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import time_machine
from typer.testing import CliRunner

from faletl import pipeline
from faletl.cli.commands import app
from faletl.config import Settings
from faletl.sandbox import Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from tests.conftest import published_path, settings_for
from tests.servers import postgres_program

PAGE = (Path(__file__).parents[2] / "docs" / "bi.md").read_text("utf-8")


def said_by(command: str) -> str:
    """What a line for the shell prints, out and err: psql or faletl, with variables before it."""
    words = shlex.split(command)
    given = {}
    while "=" in words[0]:
        name, _, given[name] = words.pop(0).partition("=")
    program, *words = words
    if program == "faletl":
        return CliRunner(env=given).invoke(app, words).output
    done = subprocess.run(
        [postgres_program(program), *words],
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def test_what_the_page_shows_for_a_server_works(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path, database: str
) -> None:
    settings = settings_for(sandbox.url, tmp_path, warehouse=database)
    assert pipeline.run(settings, Asked(resources=("usage",))).exit_code == 0
    with psycopg.connect(database, autocommit=True) as owner:
        owner.execute("drop role if exists anna; drop role if exists analysts")
    owner_at, _, where = database.rpartition("@")
    here = PAGE.replace("postgresql://owner@", f"{owner_at}@").replace("db.example.com/spend", where)

    commands = re.findall(r"^\$ (.*\b(?:psql|faletl) .*)\n(?=(.*))", here, re.MULTILINE)
    commands = [(command, shown) for command, shown in commands if where in command]
    assert len(commands) == 4
    for command, shown in commands:
        said = said_by(command)
        if not shown.startswith(("$", "```")):
            assert said.startswith(f"{shown}\n"), command
    scripts = [code for code in re.findall(r"```python\n(.*?)```", here, re.DOTALL) if where in code]
    assert scripts
    for code in scripts:
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102  # the page's
        names["engine"].dispose()


READER = """
import sys, duckdb
opened = []
for line in sys.stdin:
    if line == "close all\\n":
        while opened:
            opened.pop().close()
    opened.append(duckdb.connect(sys.argv[1], read_only=True))
    print(*[len(one.execute("from marts.fct_credit_balance").fetchall()) for one in opened], flush=True)
"""
"""Opens one more connection for each line, and tells how many rows each of them sees."""


@pytest.mark.duckdb_only("a server has no file")
def test_a_reader_of_the_file_keeps_what_it_opened_until_all_its_connections_are_closed(
    clock: time_machine.Traveller, settings: Settings
) -> None:
    def run() -> None:
        assert pipeline.run(settings, Asked(resources=("credits",))).exit_code == 0
        clock.shift(timedelta(hours=1))

    def read(line: str) -> str:
        assert reader.stdin
        assert reader.stdout
        reader.stdin.write(f"{line}\n")
        reader.stdin.flush()
        return reader.stdout.readline().strip()

    run()
    path = published_path(settings)
    assert path.stat().st_mode & 0o777 == 0o440
    command = [sys.executable, "-c", READER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        with open_warehouse(settings).lease("a long load"):
            assert read("open") == "1"
        run()
        assert read("open") == "1 1"
        assert read("close all") == "2"
