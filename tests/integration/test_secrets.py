"""No byte of a key is left anywhere: whatever a command does, whatever fal echoes, however it ends."""

from __future__ import annotations

import base64
import faulthandler
import io
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import httpcore
import pytest
import time_machine
import typer

from faletl import pipeline
from faletl.cli import commands
from faletl.cli.commands import app
from faletl.cli.runtime import run_command
from faletl.config import Settings
from faletl.errors import ApiUnavailableError
from faletl.fal.client import FalClient
from faletl.line.accounts import look_up
from faletl.redaction import REDACTED
from faletl.sandbox import Credential, Fault, Request, Sandbox
from tests import truth
from tests.conftest import ask, opened, settings_for
from tests.forked import Trap, start
from tests.leaks import everything_in, leaks

KEY = "9f3c1e77-4b2a-kid0:c4n4ry5ecretQ7ZXJ0193hvwm2pyd"
METRICS_KEY = "e80d6b52-77aa-kid1:m3tr1c5ecretW8YXK4420jqrt6nbz"
SECRET = KEY.split(":")[1]

ECHOES = (
    f"Authorization: Key {KEY}",
    f"no such secret {SECRET}",
    f"https://fal.example/?key={quote(KEY, safe='')}",
    f"Basic {base64.b64encode(f'Key {METRICS_KEY}'.encode()).decode()}",
)

DAYS = ("--start", "2026-11-21", "--end", "2026-11-23")
QUERY = "from reports.rpt_spend_daily"


def all_commands(folder: Path) -> Iterator[tuple[str, ...]]:
    """Every command, in an order in which each has something to do."""
    (folder / "in-the-way").touch()
    yield ("check",)
    yield ("run", "--dry-run", *DAYS)
    yield ("--debug", "run", *DAYS)
    yield ("extract", *DAYS)
    yield ("load",)
    yield ("build", "--full")
    yield ("publish",)
    yield ("status",)
    yield ("status", "--json")
    for form in ("table", "csv", "json", "parquet"):
        yield ("sql", "from reports.rpt_spend_daily", "--format", form)
    yield ("estimate", f"{truth.FLUX}=1")
    yield ("quarantine", "list", "--all")
    for read in [*folder.glob("landing/*/usage/2026-11-21/*"), folder][:1]:
        yield ("quarantine", "show", read.name)
    yield ("quarantine", "retry")
    yield ("accept", "usage", "2026-11-21", "--reason", "asked support")  # nothing is held
    yield ("validate", "--docs", str(folder / "docs"))
    yield ("stage", "--out", str(folder / "handover"))
    yield ("landing", "du")
    for page in [*folder.glob("landing/*/usage/2026-11-21/*/*.json.zst"), folder][:1]:
        yield ("landing", "scrub", str(page))
    yield ("landing", "prune")
    yield ("maintain",)
    yield ("verify",)
    yield ("rebuild", "--window", "2026-11-21")
    yield ("rebuild",)
    yield ("accounts",)
    yield ("accounts", "list")
    yield ("horizon", "--set", "2026-11-21")
    label = f"acme no such secret {REDACTED}"
    yield ("accounts", "rename", label, "renamed")
    yield ("accounts", "rename", "renamed", label)
    yield ("accounts", "forget", label)  # not without --yes
    yield ("grant", "--reader", "analysts")  # a file has no roles
    yield ("sandbox", "--host", "203.0.113.1")  # an address of nobody
    yield ("demo", "--folder", str(folder / "in-the-way"))


@dataclass
class Said:
    """What a command ended with, wrote to its outputs, and what any logger told meanwhile."""

    code: int
    output: bytes
    logged: str


@contextmanager
def shell(folder: Path, url: str, **environment: str) -> Iterator[None]:
    """The environment of somebody who runs faletl in the folder, where temporary files go, too."""
    variables = {
        "FAL_KEY": KEY,
        "FAL_METRICS_KEY": METRICS_KEY,
        "FALETL_API_URL": url,
        "FALETL_WAREHOUSE": f"duckdb:///{folder / 'warehouse.duckdb'}",
        "FALETL_LANDING": str(folder / "landing"),
        "FALETL_FIRST_DAYS": "2",
        "FALETL_RATE": "0",
        "HOME": str(folder),
        **environment,
    }
    with pytest.MonkeyPatch.context() as patch, time_machine.travel(truth.NOW, tick=True):
        for name, value in variables.items():
            patch.setenv(name, value)
        (folder / "tmp").mkdir(exist_ok=True)
        patch.setattr("tempfile.tempdir", str(folder / "tmp"))
        patch.chdir(folder)
        patch.setattr("faletl.fal.client.TRIES", 2)
        patch.setattr("faletl.fal.client.BACKOFF_SECONDS", 0.001)
        yield
        (folder / "tmp").rmdir()  # nothing is left in there


CHATTY = ("httpx", "httpcore", "sqlalchemy.engine", "faletl")


def faletl(*args: str) -> Said:
    """Run a command in this process, with the loggers that could tell a key made to tell all."""
    output, logged = io.BytesIO(), io.StringIO()
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    with pytest.MonkeyPatch.context() as patch, io.TextIOWrapper(output, "utf-8") as stream:
        patch.setattr("sys.argv", ["faletl", *args])
        patch.setattr("sys.stdout", stream)
        patch.setattr("sys.stderr", stream)
        for one in loggers[:-1]:  # ours is set up by the command
            one.handlers, one.propagate = [logging.StreamHandler(logged)], False
            one.setLevel(logging.DEBUG)
        try:
            code = run_command(app)
        finally:
            for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
                one.handlers, one.propagate = handlers, propagate
                one.setLevel(level)
        stream.flush()
        return Said(code, output.getvalue(), logged.getvalue())


def assert_nothing_left(folder: Path, said: list[Said]) -> None:
    """Of neither key, in files or outputs or logs."""
    told = b"\n".join(one.output + one.logged.encode() for one in said)
    for content in (everything_in(folder), told):
        for key in (KEY, METRICS_KEY):
            assert leaks(key, content) == set()


def echoing_account() -> truth.Account:
    """One whose every text holds a key, in one form or another, and a row that cannot be right."""
    account = truth.two_days()
    account.account = f"acme {ECHOES[1]}"
    account.lines = [
        replace(
            one,
            endpoint_id=f"{one.endpoint_id}/{ECHOES[number % 4]}",
            unit=f"{one.unit} {ECHOES[number % 3]}",
            credential=Credential(ECHOES[number % 4], login_username=f"bob {ECHOES[number % 2]}"),
        )
        for number, one in enumerate(account.lines)
    ]
    wrong = truth.line(account.lines[0].hour, f"x/{SECRET}", "0", percent_discount="101")
    account.lines.append(wrong)
    account.catalogue.append({"endpoint_id": f"x/{KEY}", "metadata": {"description": ECHOES[0]}})
    account.list_price(truth.VOICE, "0.02", f"1000 characters {SECRET}")
    return account


def assert_private(folder: Path) -> None:
    """Nobody else can read what was written but is not meant to be read; and there is nothing else."""
    meant = {"docs", "handover", "spend.duckdb", "in-the-way"}
    assert {path.name for path in folder.iterdir()} - meant == {
        "landing", "warehouse.duckdb", "warehouse.duckdb.lock",
    }  # fmt: skip
    assert stat.S_IMODE((folder / "spend.duckdb").stat().st_mode) == 0o440
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] not in meant:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def with_echoing_headers(_: Request) -> Fault:
    """The answer as it would be, with keys in its headers."""
    headers = {"x-fal-request-id": f"req {SECRET}", "x-echo": ECHOES[0], "set-cookie": ECHOES[3]}
    return Fault(headers=headers)


def test_no_command_leaves_anything_of_a_key_though_fal_echoes_it_everywhere(tmp_path: Path) -> None:
    keys = {KEY: "FULL", METRICS_KEY: "READONLY"}
    with (
        Sandbox(echoing_account(), keys=keys, fault=with_echoing_headers) as server,
        shell(tmp_path, server.url),
    ):
        said = {args: faletl(*args) for args in all_commands(tmp_path)}
    sent = {request.headers.get("authorization") for request in server.requests}
    assert sent == {f"Key {KEY}", f"Key {METRICS_KEY}"}  # so they were really used
    words = {" ".join(words) for words, _ in commands_of(commands.app)}
    used = {word for word in words for args in said if f"{word} " in f"{' '.join(args)} "}
    assert used == words
    # One window is refused for a row that cannot be right, so what meets it fails; all else is done.
    failed = {args[0] for args, one in said.items() if one.code}
    assert failed == {
        "--debug", "extract", "load", "quarantine", "accept", "accounts", "grant", "sandbox", "demo",
    }, said  # fmt: skip
    assert_nothing_left(tmp_path, list(said.values()))
    assert_private(tmp_path)

    manifests = [json.loads(path.read_bytes()) for path in tmp_path.rglob("manifest.json")]
    redacted = {one["resource"] for one in manifests if one.get("redacted_pages")}
    assert redacted == {"usage", "billing_events", "models", "prices", "credits"}
    settings = settings_for(server.url, tmp_path)
    found = ask(settings, "select distinct account from ops.loads", opened)
    assert found == [(f"acme no such secret {REDACTED}",)]
    for (raw_json,) in ask(settings, "select raw_json from ops.quarantine", opened):
        assert f'"x/{REDACTED}"' in raw_json


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, json.dumps({"error": {"message": " ".join(ECHOES)}})),
        (422, json.dumps({"detail": [{"input": ECHOES}]})),
        (500, " ".join(ECHOES)),
        (200, f"<html>{' '.join(ECHOES)}</html>"),
        (200, json.dumps({"models": ECHOES[0], ECHOES[1]: ECHOES[2]})),
    ],
    ids=["refused", "refused parameters", "out of order", "web page", "another document"],
)  # fmt: skip
def test_an_error_leaves_nothing_of_a_key(status: int, body: str, tmp_path: Path) -> None:
    def fault(request: Request) -> Fault:
        return replace(with_echoing_headers(request), status=status, body=body.encode())

    with Sandbox(truth.two_days(), fault=fault) as server, shell(tmp_path, server.url):
        said = [
            faletl("--debug", "--log-format", form, *args)
            for form in ("text", "json")
            for args in (("check",), ("run", *DAYS), ("extract", *DAYS), ("estimate", "x=1"))
        ]
    assert all(one.code in (1, 2, 3) for one in said)
    assert_nothing_left(tmp_path, said)


# --- When something else is wrong -----------------------------------------------------------------


@pytest.mark.parametrize("broken", ["key", "warehouse"])
def test_a_command_that_fails_leaves_nothing_of_a_key(broken: str, tmp_path: Path) -> None:
    environment = {}
    if broken == "key":
        environment = {"FAL_KEY": KEY.replace(":", "\n"), "FAL_METRICS_KEY": f"Key {METRICS_KEY} "}
    else:
        (tmp_path / "warehouse.duckdb").write_bytes(b"no database")
    with (
        Sandbox(truth.two_days(), keys={KEY: "FULL", METRICS_KEY: "READONLY"}) as server,
        shell(tmp_path, server.url, **environment),
    ):
        said = {args: faletl("--log-format", "json", *args) for args in all_commands(tmp_path)}
        if broken == "key":
            assert server.requests == []
    codes = {" ".join(args[:2]): one.code for args, one in said.items()}
    assert codes["--debug run"] == (2 if broken == "key" else 4)
    assert_nothing_left(tmp_path, list(said.values()))


def test_a_killed_run_leaves_nothing_of_a_key_in_what_nobody_cleared_away(tmp_path: Path) -> None:
    account = truth.two_days()
    account.lines[0] = replace(account.lines[0], credential=Credential(ECHOES[0]))
    (tmp_path / "tmp").mkdir()
    with Sandbox(account, keys={KEY: "FULL"}) as server:
        settings = settings_for(server.url, tmp_path)
        environment = {"FAL_KEY": KEY, "TMPDIR": str(tmp_path / "tmp")}
        code, said = start(
            settings, Trap("faletl.line.replace._record_load", nth=5), **environment
        ).finish()
    assert code == -signal.SIGKILL, said
    assert list(tmp_path.glob("tmp/*/*.parquet"))
    assert (tmp_path / "warehouse.duckdb.wal").exists()
    assert stat.S_IMODE((tmp_path / "warehouse.duckdb.wal").stat().st_mode) == 0o600
    left = everything_in(tmp_path)
    assert REDACTED.encode() in left
    assert leaks(KEY, left) == set()


CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


@pytest.mark.skipif(
    not CORE_PATTERN.exists()
    or CORE_PATTERN.read_text().startswith("|")
    or resource.getrlimit(resource.RLIMIT_CORE)[1] == 0,
    reason="core dumps go to another program here, or are off: no limit of ours decides",
)
def test_a_crash_dumps_no_core(tmp_path: Path) -> None:
    code = "from faletl.cli import main; main()"
    process = subprocess.Popen(
        ["sh", "-c", 'ulimit -c "$(ulimit -H -c)"; exec "$@"', "sh", sys.executable, "-c", code,
         "sandbox", "--port", "0"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "FAL_KEY": KEY},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith(b"Serving")
        process.send_signal(signal.SIGABRT)
        _, status = os.waitpid(process.pid, 0)
    process.returncode = -os.WTERMSIG(status)
    assert os.WTERMSIG(status) == signal.SIGABRT
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []


# --- Whoever prints what is in memory -------------------------------------------------------------


def locals_of(error: BaseException) -> bytes:
    """All variables of all frames of an error and of those before it, also of those it hides."""
    told, below = [], [error]
    while below:
        one = below.pop()
        shown = traceback.TracebackException.from_exception(one, capture_locals=True)
        told.append("".join(shown.format(chain=False)))
        below += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(told).encode()


def test_a_traceback_with_locals_shows_nothing_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> NoReturn:
        is_sent.append(SECRET in repr(given))
        raise httpcore.WriteTimeout

    is_sent: list[bool] = []
    monkeypatch.setattr("httpcore._backends.sync.SyncStream.write", fail)
    monkeypatch.setattr("faletl.fal.client.TRIES", 1)
    with Sandbox(truth.two_days()) as server:
        settings = Settings.isolated(key=KEY, api_url=server.url)
        with FalClient(settings) as client, pytest.raises(ApiUnavailableError) as caught:
            look_up(client, settings, {})
    assert is_sent == [True]  # so the frames below had the key
    assert leaks(KEY, locals_of(caught.value)) == set()


def test_a_dump_of_all_threads_shows_nothing_of_a_key(tmp_path: Path) -> None:
    def dump(_: Request) -> None:
        with (tmp_path / "dump").open("ab") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    with Sandbox(truth.two_days(), keys={KEY: "FULL"}, fault=dump) as server:
        pipeline.extract(settings_for(server.url, tmp_path, key=KEY))
    dumped = (tmp_path / "dump").read_bytes()
    assert b"in _try" in dumped
    assert leaks(KEY, dumped) == set()


# --- Where a key may be given ---------------------------------------------------------------------


def commands_of(app: typer.Typer) -> list[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    found: list[tuple[tuple[str, ...], Any]] = []

    def look(words: tuple[str, ...], command: Any) -> None:
        for name, below in getattr(command, "commands", {}).items():
            look((*words, name), below)
        if not hasattr(command, "commands"):
            found.append((words, command))

    look((), typer.main.get_command(app))
    return found


def test_no_option_takes_a_key(tmp_path: Path) -> None:
    """A command line is seen by everybody on the machine, and kept by shells."""
    for words, command in commands_of(commands.app):
        names = {option for parameter in command.params for option in (parameter.name, *parameter.opts)}
        assert not [n for n in names if any(w in n for w in ("key", "secret", "token", "pass"))], words
    with shell(tmp_path, "http://127.0.0.1:9"):
        for option in ("--key", "--fal-key", "--api-key"):
            assert faletl("run", option, KEY).code == 2


ELSEWHERE = (
    "file:///etc/passwd",
    "gopher://127.0.0.1:70/_x",
    "ftp://127.0.0.1/v1",
    "http://169.254.169.254/latest/meta-data",
    "http://[fd00:ec2::254]/latest",
    "http://0.0.0.0/v1",
    "http://2852039166/v1",
    "http://0xa9fea9fe/v1",
    "http://127.0.0.1@169.254.169.254/v1",
    "https://key:word@api.fal.ai/v1",
    "https://api.fal.ai\\@169.254.169.254/v1",
    "https://api.f\N{CYRILLIC SMALL LETTER A}l.ai/v1",
    "https://api\N{FULLWIDTH FULL STOP}fal.ai/v1",
    "https://api.fal.ai/v1#@169.254.169.254",
)


def test_a_url_that_leads_elsewhere_is_wrong_use_and_gets_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[object] = []
    monkeypatch.setattr("socket.socket.connect", lambda _socket, *where: reached.append(where))
    for url in ELSEWHERE:
        with shell(tmp_path, url):
            done = faletl("check")
        assert (done.code, len(done.output.splitlines())) == (2, 1), url
    assert reached == []


def test_what_describes_the_settings_marks_what_is_secret() -> None:
    properties: Mapping[str, Any] = Settings.model_json_schema()["properties"]
    hidden = {name for name, one in properties.items() if '"writeOnly": true' in json.dumps(one)}
    assert hidden == {"FAL_KEY", "FAL_METRICS_KEY", "FALETL_PROXY"}
