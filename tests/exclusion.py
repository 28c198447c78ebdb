"""Many processes over one warehouse, round after round: `python -m tests.exclusion --rounds 200`.

In each round two to five commands run at once, in processes of their own, while fal's account is not
what it was in the round before: over the same days, over days that overlap, step by step, beside a
rebuild. Some are killed while they hold the warehouse; some are frozen then, for longer than others
wait, and go on later; on a server some lose their session meanwhile. A reader looks all the time. Then
code that shares nothing with faletl's looks at exit codes, at the ledger, at the tables after one more
clean run, and at what the reader saw.

A seed gives the same rounds again, though not the same instants. The processes are forked from this one,
which has imported everything and opened nothing: so they cost a second, not five.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import psycopg
import time_machine

import faletl.line.distributed
import faletl.operations.check
import faletl.operations.rebuild
import faletl.warehouse.duckdb
import faletl.warehouse.postgres  # noqa: F401  # imported here, it is in every fork
from faletl import cli
from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Sandbox
from tests import truth
from tests.conftest import ask, opened, published_path, settings_for
from tests.forks import Fork, asked_to_stop, forked, parse_all_sql
from tests.reading_on import SUMS
from tests.reading_on import opened as opened_by_reader
from tests.servers import shared_postgres

WORLD_LASTS = 10
"""So many rounds have the same warehouse: then another is made, by whoever comes first."""

ROUND_SECONDS = 480
"""How long a round may take on a slow machine before it is taken for stuck."""

PATIENCE, NO_PATIENCE = 120.0, 0.5
"""FALETL_LOCK_SECONDS of most processes, and of those that have none."""

RESOURCES = ("--resource", "usage", "--resource", "billing_events")

MAY_FAIL_WITH = {"WarehouseBusyError", "LeaseLostError"}
"""What a process may end with, with exit code 1; see `Process.judge` for those to whom more happened."""


# --- Processes ------------------------------------------------------------------------------------

Fate = Literal["left alone", "killed", "frozen", "cut off", "impatient"]
"""What happens to a process: killed, or frozen, while it holds the warehouse; cut off: its session ends
while it is frozen; impatient: it comes while somebody is frozen."""


@dataclass
class Process:
    """A command of faletl's, in a process of its own."""

    words: Sequence[str]
    fate: Fate
    lock_seconds: float
    said: Path
    pid: int = 0
    code: int | None = None
    was_frozen: bool = False
    frozen_until: Process | None = None
    """Has ended."""

    def start(self, environment: Mapping[str, str]) -> None:
        """Fork, and run the command line."""
        self.pid = forked()
        if self.pid:
            return
        code = 70
        try:
            output = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(environment, FALETL_LOCK_SECONDS=str(self.lock_seconds))
            tempfile.tempdir = None  # TMPDIR is another one now
            sys.argv = ["faletl", "--log-format", "json", *self.words]
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal, if it still is there."""
        if self.code is None:
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Whether it has; keeps its exit code."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def errors(self) -> Iterator[Mapping[str, Any]]:
        """The errors that it told, as it tells them to machines."""
        for line in self.said.read_text("utf-8").splitlines():
            with suppress(ValueError):
                told = json.loads(line)
                if "error" in told:
                    yield told

    def told(self) -> str:
        """What it was, and what became of it."""
        what = " ".join(self.words).removesuffix(" ".join(RESOURCES)).strip()
        happened = "" if self.fate == "left alone" else f" ({self.fate})"
        errors = {error["error"] for error in self.errors()} if self.code == 1 else set()
        return " ".join([f"{what}{happened} → {self.code}", *sorted(errors)])

    def judge(self, held_by: Sequence[int]) -> Iterator[str]:
        """What is wrong with its end; `held_by` were frozen while they held the warehouse."""
        allowed = set(MAY_FAIL_WITH)
        if self.words[0] == "publish" or (self.fate == "cut off" and self.was_frozen):
            allowed.add("WarehouseError")  # "loaded data is not built yet"; its session is gone
        errors = list(self.errors())
        if self.fate == "killed" and self.code == -signal.SIGKILL:
            return
        if self.code not in (0, 1) or (self.code == 1) != bool(errors):
            yield f"{self.told()}: {self.said.read_text('utf-8')[-2000:]}"
        for error in errors:
            if error["error"] not in allowed or error["exit_code"] != 1:
                yield f"{self.told()}: {error}"
        if self.fate == "impatient":
            busy = [error["message"] for error in errors if error["error"] == "WarehouseBusyError"]
            names = [re.search(r"process (\d+) on .* since 20\d\d-", message) for message in busy]
            if not busy or not all(name and int(name[1]) in held_by for name in names):
                yield f"{self.told()}, which does not name one of {held_by} and since when: {errors}"


# --- Who holds the warehouse ----------------------------------------------------------------------


class Onlooker:
    """A fork that looks all the time who holds the warehouse."""

    _format = "qq"

    def __init__(self, settings: Settings) -> None:
        self._shared = mmap.mmap(-1, struct.calcsize(self._format))
        self._fork = Fork(lambda: self._watch(settings))

    def holder(self) -> int:
        """The pid of who was seen to hold the warehouse last, 0 if nobody did."""
        return self._seen()[1]

    def is_still(self, pid: int) -> bool:
        """Whether somebody still holds the warehouse, looking anew."""
        looks = self._seen()[0]
        wait_until(lambda: self._seen()[0] >= looks + 2, 30)
        return self.holder() == pid

    def stop(self) -> None:
        """End it."""
        self._fork.stop()

    def _seen(self) -> tuple[int, int]:
        looks, pid = struct.unpack(self._format, self._shared[:])
        return looks, pid

    def _watch(self, settings: Settings) -> None:
        looks = 0
        look = _holder_on_server(settings) if is_on_server(settings) else _holder_of_file(settings)
        while not asked_to_stop(0.01):
            looks += 1
            self._shared[:] = struct.pack(self._format, looks, look())


def _holder_of_file(settings: Settings) -> Callable[[], int]:
    told = Path(settings.warehouse.removeprefix("duckdb:///") + ".holder")

    def look() -> int:
        try:
            return int(json.loads(told.read_bytes())["pid"])
        except (OSError, ValueError):
            return 0

    return look


def _holder_on_server(settings: Settings) -> Callable[[], int]:
    connection = psycopg.connect(settings.warehouse, autocommit=True)

    def look() -> int:
        found = connection.execute(
            "select application_name from pg_locks join pg_stat_activity using (pid) "
            "where locktype = 'advisory' and granted and datname = current_database()"
        ).fetchone()
        name = re.search(r"process (\d+) on", found[0]) if found else None
        return int(name[1]) if name else 0

    return look


def cut_off(settings: Settings) -> None:
    """End the session of whoever holds the warehouse, as a fail-over does."""
    with psycopg.connect(settings.warehouse, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid, 10000) from pg_locks join pg_stat_activity using (pid) "
            "where locktype = 'advisory' and granted and datname = current_database()"
        )


def is_on_server(settings: Settings) -> bool:
    """Whether the warehouse is one of PostgreSQL's."""
    return settings.warehouse.startswith("postgresql:")


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    """Look again and again; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.005)


# --- The reader -----------------------------------------------------------------------------------

Days = Mapping[date, Decimal]
"""What was spent on each day."""

NEWEST_BUILD = "select build_id, fencing_token from ops.builds order by fencing_token desc limit 1"
SPENT = "select usage_date, sum(cost_total) from reports.rpt_spend_daily group by 1"
READ_AT = "select max(last_read_at) from ops.loads"


def read_on(settings: Settings, before: Days, after: Days) -> tuple[int, list[str]]:
    """Until asked to stop: look at what is published, as often as it changes.

    Returns how often, and what was not as it must be: layers that differ, a day that is neither as it
    was nor as it is, anything older than what was seen earlier.
    """
    looks, wrong, last = 0, list[str](), ""
    seen: dict[str, Any] = {"token": 0, "read": datetime.min.replace(tzinfo=UTC)}
    new, builds = set[date](), dict[str, Any]()
    while not asked_to_stop(0.05):
        if (now := _state_of(settings)) in ("", last):
            continue
        last = now
        looks += 1
        with opened_by_reader(_published(settings)) as connection:
            answers = [_look(connection) for _ in range(2)]
        build, sums, days, read = answers[0]
        if build is None:
            continue
        *spent, units, _version = sums
        if answers[0] != answers[1] or len(set(spent)) != 1 or not units:
            wrong.append(f"half a state: {answers}")
        if builds.setdefault(build[0], days) != days:
            wrong.append(f"build {build} showed {builds[build[0]]}, then {days}")
        if build[1] < seen["token"] or read < seen["read"]:
            wrong.append(f"older than before: {build}, {read} after {seen}")
        seen = {"token": build[1], "read": read}
        for day, cost in days.items():
            was, will_be = before.get(day), after.get(day)
            if cost != will_be and (cost != was or day in new):
                wrong.append(f"{day} is {cost}: neither {was} before, nor {will_be} after, {day in new}")
            if cost == will_be != was:
                new.add(day)
    return looks, wrong


def _look(connection: Any) -> tuple[Any, ...]:
    build = connection.execute(NEWEST_BUILD).fetchone()
    sums = connection.execute(SUMS).fetchone()
    days = dict(connection.execute(SPENT).fetchall())
    (read,) = connection.execute(READ_AT).fetchone()
    return build, sums, days, read and read.astimezone(UTC)


def _published(settings: Settings) -> str:
    return settings.warehouse if is_on_server(settings) else str(published_path(settings))


def _state_of(settings: Settings) -> str:
    """Another one when something else is published; empty while nothing is."""
    if is_on_server(settings):
        with psycopg.connect(settings.warehouse) as connection:
            found = connection.execute("select to_regclass('marts.fct_usage') is not null").fetchone()
            is_built = found is not None and found[0]
        return str(time.monotonic()) if is_built else ""
    try:
        file = published_path(settings).stat()
    except FileNotFoundError:
        return ""
    return f"{file.st_ino} {file.st_mtime_ns}"


# --- What the warehouse must hold -----------------------------------------------------------------


@dataclass
class Ledger:
    """What was known of the ledger after the round before."""

    loads: frozenset[str] = frozenset()
    token: int = 0


def wrongs(settings: Settings, account: truth.Account, known: Ledger) -> tuple[list[str], Ledger]:
    """What is not as it must be, now that all is quiet; with what the ledger holds."""
    now = datetime.now(UTC)
    told = [*_wrong_tables(settings, account, now)]
    names = (
        "account", "resource", "window_start", "load_id", "rows", "cost_total", "digest",
        "asked_digest", "fencing_token", "is_current", "loaded_at",
    )  # fmt: skip
    found = ask(settings, f"select {', '.join(names)} from ops.loads", opened)
    loads = [dict(zip(names, row, strict=True)) for row in found]
    told += _wrong_ledger(settings, loads, now)
    ((token,),) = ask(settings, "select fencing_token from ops.warehouse", opened)
    held = Ledger(frozenset(load["load_id"] for load in loads), token)
    if lost := known.loads - held.loads:
        told.append(f"loads that the ledger has lost: {sorted(lost)}")
    if token <= known.token:
        told.append(f"the newest token is {token} after {known.token}")
    return told, held


def _wrong_tables(settings: Settings, account: truth.Account, now: datetime) -> Iterator[str]:
    """Tables that are not what the served account makes them."""
    hourly = ask(
        settings,
        "select account, used_at, endpoint_id, unit, unit_price, percent_discount, currency, "
        "credential_id, quantity, cost_total from marts.fct_usage",
    )
    daily = ask(
        settings,
        "select account, usage_date, endpoint_id, unit, currency, quantity, cost_subtotal, "
        "cost_discount, cost_total, effective_unit_price from reports.rpt_spend_daily",
    )
    charged = ask(
        settings,
        "select account, requested_at, request_id, endpoint_id, credential_id, cost_total "
        "from marts.fct_billing_event",
    )
    if {row[:8]: row[8:] for row in hourly} != truth.spend_by_hour(account, now):
        yield "marts.fct_usage is not what fal served"
    if {row[:5]: row[5:] for row in daily} != truth.spend_daily(account, now):
        yield "reports.rpt_spend_daily is not what fal served"
    if Counter(charged) != truth.charged(account, now):
        yield "marts.fct_billing_event is not what fal served"


def _wrong_ledger(
    settings: Settings, loads: Sequence[Mapping[str, Any]], now: datetime
) -> Iterator[str]:
    """What the ledger says of a window twice, not at all, out of order, or other than raw holds it."""
    windows = defaultdict[tuple[str, datetime], list[Mapping[str, Any]]](list)
    for load in sorted(loads, key=lambda load: (load["loaded_at"], load["fencing_token"])):
        windows[load["resource"], load["window_start"]].append(load)
    for window, mine in windows.items():
        if sum(load["is_current"] for load in mine) != 1:
            yield f"{window} has not one current load: {mine}"
        tokens = [load["fencing_token"] for load in mine]
        if tokens != sorted(set(tokens)):
            yield f"the tokens of {window} do not grow: {tokens}"
        held = [(load["digest"], load["asked_digest"]) for load in mine]
        if any(one == then for one, then in pairwise(held)):
            yield f"{window} was loaded twice with the same rows: {mine}"
    days = {start.date() for (resource, start) in windows if resource == "usage"}
    last = (now - timedelta(minutes=65)).date()  # of which an hour is over
    if gone := {min(days) + timedelta(n) for n in range((last - min(days)).days + 1)} - days:
        yield f"no usage is loaded of {sorted(gone)}"
    rows = _held_by_day(settings)
    entered = {
        (load["resource"], load["window_start"].date()): (load["rows"], load["cost_total"])
        for load in loads
        if load["is_current"] and load["resource"] in ("usage", "billing_events") and load["rows"]
    }
    if entered != rows:
        yield f"the ledger has {entered}, raw has {rows}"


def _held_by_day(settings: Settings) -> dict[tuple[str, date], tuple[int, Decimal]]:
    """Per resource and UTC day the rows of its raw table and their sum."""
    held: dict[tuple[str, date], tuple[int, Decimal]] = {}
    for name, time_column in (("usage", "bucket"), ("billing_events", "timestamp")):
        for at, cost in ask(settings, f'select "{time_column}", cost_total from raw.{name}', opened):
            rows, total = held.get((name, at.date()), (0, Decimal(0)))
            held[name, at.date()] = rows + 1, total + cost
    return held


# --- Fal's account --------------------------------------------------------------------------------


def changed(account: truth.Account, since: datetime, now: datetime, chance: random.Random) -> None:
    """What happens to the account until now: hours go by, lines are late, restated, or taken back."""
    hour = since.replace(minute=0, second=0, microsecond=0)
    while (hour := hour + timedelta(hours=1)) < now:
        account.lines.append(_line(hour, chance))
    lately = [n for n, one in enumerate(account.lines) if one.hour >= _first_changing(now)]
    for number in chance.sample(lately, min(2, len(lately))):
        account.lines[number] = _line(account.lines[number].hour, chance)
    if len(lately) > 8:
        del account.lines[chance.choice(lately)]
    late = _first_changing(now) + timedelta(hours=chance.randrange(24))
    account.lines.append(_line(late, chance))


def _first_changing(now: datetime) -> datetime:
    """From here on the account changes; what is older stays."""
    return datetime(now.year, now.month, now.day, tzinfo=UTC) - timedelta(days=1)


def _line(hour: datetime, chance: random.Random) -> Any:
    endpoint, price, unit = chance.choice(
        [(truth.FLUX, "0.025", "images"), (truth.VIDEO, "0.4", "second")]
    )
    return truth.line(hour, endpoint, f"{chance.randrange(1, 10**6)}.000001", price, unit=unit)


def spent(account: truth.Account, now: datetime) -> Days:
    """What rpt_spend_daily must say of each day."""
    days: dict[date, Decimal] = {}
    for key, amounts in truth.spend_daily(account, now).items():
        days[key[1]] = days.get(key[1], Decimal(0)) + amounts[3]
    return days


# --- A round --------------------------------------------------------------------------------------


def commands(
    chance: random.Random, today: date, most: int, *, is_first: bool
) -> tuple[str, list[list[str]]]:
    """What runs at once, at most so many, with a name for it."""
    days = [(today - timedelta(days=n)).isoformat() for n in range(4)]
    same = ["run", "--start", days[1], *RESOURCES]
    several = chance.randint(2, most)
    kinds: dict[str, list[list[str]]] = {
        "the same window": [same] * several,
        "overlapping windows": [
            ["run", "--start", days[chance.randint(1, 3)], *RESOURCES] for _ in range(several)
        ],
        "a backfill and what is due": [
            ["run", "--start", days[3], "--end", days[0], *RESOURCES], *[["run"]] * (several - 1)
        ],
        "step by step": chance.sample(
            [["extract", *same[1:]], ["load"], ["build"], ["publish"], same], several
        ),
        "a rebuild beside runs": [["rebuild"], *[same] * (several - 1)],
        "a rebuild of a day": [["rebuild", "--window", days[1]], *[same] * (several - 1)],
    }  # fmt: skip
    if is_first:
        del kinds["a rebuild of a day"]  # there has to be something
    name = chance.choice(list(kinds))
    return name, kinds[name]


@dataclass
class World:
    """An account of fal's, a warehouse with its landed pages, and what was known of them."""

    folder: Path
    settings: Settings
    account: truth.Account
    since: datetime
    known: Ledger = field(default_factory=Ledger)
    shown: Days = field(default_factory=dict)

    def environment(self, url: str) -> dict[str, str]:
        """What the processes get."""
        return {
            "FAL_KEY": FULL_KEY,
            "FALETL_API_URL": url,
            "FALETL_WAREHOUSE": self.settings.warehouse,
            "FALETL_LANDING": self.settings.landing,
            "FALETL_FIRST_DAYS": "2",
            "FALETL_RATE": "0",
            "FALETL_GATE": "0",
            "TMPDIR": str(self.folder / "tmp"),
        }


@dataclass
class Round:
    """A round under way."""

    number: int
    world: World
    chance: random.Random
    onlooker: Onlooker
    url: str
    processes: list[Process] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)

    def play(self, asked: Sequence[Sequence[str]], fates: Sequence[Fate]) -> Iterator[str]:
        """Start all, let happen what is to happen; tells what was wrong with their ends."""
        for words, fate in zip(asked, fates, strict=True):
            self.start(words, fate, self.chance.choice([PATIENCE, PATIENCE, PATIENCE, 1.0]))
            time.sleep(self.chance.choice([0, 0, 0.2]))
        deadline = time.monotonic() + ROUND_SECONDS
        while not all(process.has_ended() for process in self.processes):
            if time.monotonic() > deadline:
                yield f"stuck: {[one.words for one in self.processes if one.code is None]}"
                return
            for process in list(self.processes):
                if process.code is None and process.pid == self.onlooker.holder():
                    self.happen(process)
            self.thaw()
            time.sleep(0.01)
        for process in self.processes:
            yield from process.judge(self.frozen)

    def start(self, words: Sequence[str], fate: Fate, patience: float) -> Process:
        """Start a command."""
        said = self.world.folder / f"round-{self.number}-{len(self.processes)}.log"
        process = Process(words, fate, patience, said)
        process.start(self.world.environment(self.url))
        self.processes.append(process)
        return process

    def happen(self, process: Process) -> None:
        """What is to happen to a process while it holds the warehouse."""
        if process.fate == "killed":
            time.sleep(self.chance.choice([0, 0, 0.02, 0.1, 0.3]))
            process.send(signal.SIGKILL)
        elif process.fate in ("frozen", "cut off") and not process.was_frozen:
            if self.chance.random() < 0.5:
                return  # the next time: at once is always the first lease
            process.send(signal.SIGSTOP)
            if not self.onlooker.is_still(process.pid):
                process.send(signal.SIGCONT)  # it had just done
                return
            process.was_frozen = True
            self.frozen.append(process.pid)
            if process.fate == "cut off":
                Fork(lambda: cut_off(self.world.settings)).result()
                process.frozen_until = self.start(["run", *RESOURCES], "left alone", PATIENCE)
            else:
                # What needs the warehouse in any case; where there is none yet, only a run does.
                writers = ["run", "build", "rebuild"] if self.world.known.loads else ["run"]
                word = self.chance.choice(writers)
                process.frozen_until = self.start([word], "impatient", NO_PATIENCE)

    def thaw(self) -> None:
        """Let those go on that were frozen, when those that came for it have ended."""
        for process in self.processes:
            if process.frozen_until and process.frozen_until.has_ended():
                process.frozen_until = None
                process.send(signal.SIGCONT)


def chosen_fates(chance: random.Random, many: int, *, is_on_server: bool) -> list[Fate]:
    """What happens to each of so many processes: to one of them at least, mostly."""
    happening: list[Fate] = ["left alone", "killed", "killed", "frozen", "frozen"]
    if is_on_server:
        happening.append("cut off")
    fates: list[Fate] = ["left alone"] * many
    fates[chance.randrange(many)] = chance.choice(happening)
    if chance.random() < 0.3 and "left alone" in fates:
        fates[fates.index("left alone")] = "killed"
    return fates


@contextmanager
def served(account: truth.Account, folder: Path) -> Iterator[str]:
    """The account, served by a fork; its URL."""
    told = folder / "url"

    def serve() -> None:
        with Sandbox(account, page_size=4) as server:
            part = told.with_suffix(".part")
            part.write_text(server.url)
            part.replace(told)
            while not asked_to_stop(1):
                pass

    told.unlink(missing_ok=True)
    server = Fork(serve)
    try:
        wait_until(told.exists, 30)
        yield told.read_text()
    finally:
        server.stop()


def play(number: int, world: World, chance: random.Random, most: int) -> list[str]:
    """A round; tells what was wrong, and prints what happened."""
    began, now = time.monotonic(), datetime.now(UTC)
    account, is_first = world.account, not world.known.loads
    name, asked = commands(chance, now.date(), most, is_first=is_first)
    server = is_on_server(world.settings)
    fates = chosen_fates(chance, len(asked), is_on_server=server and not is_first)
    with served(account, world.folder) as url:
        onlooker = Onlooker(world.settings)
        before, after = world.shown, spent(account, now)
        reader = Fork(lambda: read_on(world.settings, before, after))
        this = Round(number, world, chance, onlooker, url)
        wrong = list(this.play(asked, fates))
        for process in this.processes:
            process.send(signal.SIGCONT)
            process.send(signal.SIGKILL)  # only if it is stuck
        last = (_first_changing(now) - timedelta(days=2)).date()
        clean = Process(["run", "--start", f"{last}", *RESOURCES], "left alone", PATIENCE,
                        world.folder / f"round-{number}-clean.log")  # fmt: skip
        clean.start(world.environment(url))
        wait_until(clean.has_ended, ROUND_SECONDS)
        if clean.code != 0:
            wrong.append(f"the clean run: {clean.said.read_text()[-2000:]}")
        looks, seen = reader.stop()
        onlooker.stop()
    wrong += seen
    found, world.known = Fork(lambda: wrongs(world.settings, account, world.known)).result()
    wrong += found
    world.shown = after
    told = "; ".join(process.told() for process in this.processes)
    say(f"{number:4}  {time.monotonic() - began:5.1f} s  {name}: {told}; {looks} looks")
    return wrong


# --- All of them ----------------------------------------------------------------------------------


def main() -> NoReturn:
    """Play the rounds; exits with 1 at the first that does not hold, and keeps what it left."""
    parser = argparse.ArgumentParser(prog="python -m tests.exclusion")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first round; a multiple of ten")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=int, default=5, help="processes that a round begins with")
    parser.add_argument("--postgres", action="store_true", help="on a private PostgreSQL server")
    given = parser.parse_args()
    parse_all_sql("duckdb", "postgres")
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="faletl-exclusion-"))
    folder.chmod(0o755)
    where = "PostgreSQL" if given.postgres else "DuckDB"
    say(f"{given.rounds} rounds on {where} from {given.first} on, seed {given.seed}, in {folder}")
    with time_machine.travel(truth.NOW, tick=True) as clock:
        wrong = play_all(given, folder, clock)
    cpu = sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
              for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip
    say(f"{time.monotonic() - began:.0f} s, {cpu:.0f} s of CPU")
    if wrong:
        say("\n".join(["WRONG:", *wrong, f"kept: {folder}"]))
    else:
        shutil.rmtree(folder)
        say(f"all {given.rounds} rounds held")
    sys.exit(bool(wrong))


def play_all(given: argparse.Namespace, folder: Path, clock: time_machine.Traveller) -> list[str]:
    """Round after round; what was wrong with the first that did not hold."""
    world: World | None = None
    for number in range(given.first, given.first + given.rounds):
        chance, of_account = (
            random.Random(f"{given.seed} {number} {what}")  # noqa: S311  # repeatable, not secret
            for what in ("processes", "account")
        )
        # No hour may end, or settle, during the round.
        clock.move_to(
            truth.NOW + number * timedelta(hours=3) - timedelta(hours=of_account.choice([0, 1]))
        )
        now = datetime.now(UTC)
        if world is None or number % WORLD_LASTS == 0:
            world = new_world(folder / f"from-{number}", is_on_server=given.postgres)
        changed(world.account, world.since, now, of_account)
        world.since = now
        if wrong := play(number, world, chance, given.most):
            return [f"round {number}", *wrong]
    return []


def new_world(folder: Path, *, is_on_server: bool) -> World:
    """A folder, and the name of a warehouse that is not there yet."""
    (folder / "tmp").mkdir(parents=True)
    given = {}
    if is_on_server:
        server = shared_postgres()
        server.drop_databases()
        given["warehouse"] = server.new_database(f"exclusion_{folder.name.replace('-', '_')}")
    else:
        given["warehouse"] = f"duckdb:///{folder / 'warehouse.duckdb'}"
    account = truth.two_days()
    account.lines.clear()
    yesterday = _first_changing(datetime.now(UTC))
    return World(folder, settings_for("http://127.0.0.1:1", folder, **given), account, yesterday)


def say(text: str) -> None:
    """To whoever waits."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
