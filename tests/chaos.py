"""Chaos: load a large account while everything goes wrong, then count what is lost, doubled or wrong.

    python -m tests.chaos                       10,000,000 events, 200 kills: most of an hour
    python -m tests.chaos --events 100000 --kills 30 --takeovers 5 --fills 3 --gate
    python -m tests.chaos --postgres --server-kills 10

A tenth of the answers is faulted (tests/faults.py), runs die by SIGKILL at random moments, holders of
the warehouse are killed while others wait, the disk fills, days are restated, readers look all the
time; with --postgres the server is killed as well. One clean run later the tables must be what was
served last.
The disk is a tmpfs in a mount namespace of our own, which takes root, or user namespaces.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_int
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import psycopg

from faletl import cli
from faletl.config import Settings
from faletl.sandbox import FULL_KEY, Fault, Request, Sandbox
from tests import laws
from tests.conftest import ask
from tests.faults import KINDS, Faults
from tests.feed import Feed, money, quantity, unit_price
from tests.servers import Postgres, Service, free_ports, wait_for
from tests.truth import Account, rounded

ACCOUNT = "chaos"
NAMESPACE = "CHAOS_HAS_A_NAMESPACE"
PAGE_ROWS = 10_000
MOST_DAYS = 100
DISK_BYTES = 12 * 2**30
RESOURCES = ("--resource", "usage", "--resource", "billing_events")
EMPTY = {
    "/models/usage": b'{"time_series":[],"summary":[],"next_cursor":null,"has_more":false}',
    "/models/billing-events": b'{"billing_events":[],"next_cursor":null,"has_more":false}',
}


# --- What is served -------------------------------------------------------------------------------


@dataclass
class Served:
    """A process that serves the feed and breaks some of its answers; what it counts is shared."""

    feed: Feed
    is_broken: Any
    pages: Any
    faults: Any
    url: str
    process: Any

    @property
    def fetched(self) -> int:
        """Whole pages of events that were sent."""
        return sum(self.pages)


@contextmanager
def serving(feed: Feed, seed: int, share: float) -> Iterator[Served]:
    """Serve the feed from another process until the end."""
    context = multiprocessing.get_context("fork")
    feed.revisions = cast("MutableSequence[int]", context.Array(c_int, feed.days))
    is_broken = context.Value(c_int, 0)
    pages = context.Array(c_int, feed.days * feed.pages_per_day)
    counts = context.Array(c_int, len(KINDS))
    ready, url = context.Pipe()

    def serve() -> None:
        faults = Faults(seed, share)
        names = [kind.name for kind in KINDS]

        def answer(request: Request) -> Fault | None:
            try:
                packed = body_of(feed, request)
            except ValueError:
                return Fault(status=400)  # a cursor, or an instant, that it never gave
            if packed is None:
                return None
            faults.is_on = bool(is_broken.value)
            fault = faults(request, lambda: zlib.decompress(packed, wbits=31))
            for number, name in enumerate(names):
                counts[number] = faults.done[name]
            if fault is not None and (fault.status or fault.drop or fault.body is not None):
                return fault
            if "billing-events" in request.path and (at := place_of(feed, request)):
                pages[at[0] * feed.pages_per_day + at[1]] += 1
            delay = fault.delay_seconds if fault else 0
            return Fault(body=packed, headers={"content-encoding": "gzip"}, delay_seconds=delay)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Sandbox(Account(ACCOUNT), fault=answer) as sandbox:
            ready.send(sandbox.url)
            while True:
                time.sleep(5)
                sandbox.requests.clear()

    process = context.Process(target=serve, daemon=True)
    process.start()
    try:
        yield Served(feed, is_broken, pages, counts, url.recv(), process)
    finally:
        process.kill()
        process.join()


def place_of(feed: Feed, request: Request) -> tuple[int, int] | None:
    """Which day and page the request is for; None for a day without events."""
    number = feed.number(date.fromisoformat(request.query["start"][0][:10]))
    page = int(request.query.get("cursor", ["page-0"])[0].removeprefix("page-"))
    return None if number is None else (number, page)


def body_of(feed: Feed, request: Request) -> bytes | None:
    """What fal would answer, gzipped; None for what the sandbox answers by itself."""
    if request.path not in EMPTY:
        return None
    if at := place_of(feed, request):
        return packed(feed, request.path, *at, feed.revision(at[0]))
    return zlib_packed(EMPTY[request.path])


@lru_cache(maxsize=1200)
def packed(feed: Feed, path: str, number: int, page: int, revision: int) -> bytes:
    """A page as it is sent."""
    return zlib_packed(feed.page(number, page) if "events" in path else feed.usage(number))


def zlib_packed(body: bytes) -> bytes:
    """The body, gzipped as fast as can be."""
    packer = zlib.compressobj(1, wbits=31)
    return packer.compress(body) + packer.flush()


# --- Who runs -------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Starts runs of faletl as children that share our imports, and remembers how they ended."""

    settings: Settings
    temporary: Path
    log: Path
    gate: bool
    codes: Counter[str] = field(default_factory=Counter)
    peak_mib: int = 0
    _code_of: dict[int, int] = field(default_factory=dict)
    """Of those that ended."""

    def start(self, *words: str, lock_seconds: float = 600) -> int:
        """Run the command line in a child; its pid."""
        sys.stdout.flush()
        if pid := os.fork():
            self._code_of.pop(pid, None)
            return pid
        code: Any = 1
        try:
            environment = {
                "PATH": os.environ["PATH"],
                "TMPDIR": str(self.temporary),
                "FAL_KEY": FULL_KEY,
                "FALETL_ACCOUNT": ACCOUNT,
                "FALETL_API_URL": self.settings.api_url,
                "FALETL_WAREHOUSE": self.settings.warehouse,
                "FALETL_LANDING": self.settings.landing,
                "FALETL_FIRST_DAYS": str(self.settings.first_days),
                "FALETL_RATE": "0",
                "FALETL_GATE": str(int(self.gate)),
                "FALETL_LOCK_SECONDS": str(lock_seconds),
            }
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None  # of this process, not of its parent
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["faletl", *words]
            cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def ended(self, pid: int, seconds: float) -> int | None:
        """The exit code, minus a signal's number; None if it still runs after so long."""
        until = time.monotonic() + seconds
        while pid not in self._code_of:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                code = self._code_of[pid] = os.waitstatus_to_exitcode(status)
                self.codes[str(code)] += 1
                self.peak_mib = max(self.peak_mib, used.ru_maxrss // 1024)
            elif time.monotonic() >= until:
                return None
            else:
                time.sleep(0.01)
        return self._code_of[pid]

    def kill(self, pid: int) -> bool:
        """SIGKILL; whether it was still running."""
        if self.ended(pid, 0) is not None:
            return False
        os.kill(pid, signal.SIGKILL)
        return self.ended(pid, 60) == -signal.SIGKILL

    def whole(self, *words: str) -> int:
        """Run to the end."""
        code = self.ended(self.start(*words), 3600)
        assert code is not None, words
        return code


# --- What goes wrong ------------------------------------------------------------------------------


@dataclass
class Chaos:
    """One trial; `count` says how often each thing happened."""

    runs: Runs
    served: Served
    disk: Path
    chance: random.Random
    pace: float
    server: tuple[Postgres, Service] | None = None
    count: Counter[str] = field(default_factory=Counter)
    dirty: set[int] = field(default_factory=set)
    """Days that were restated and may not have been read since."""

    def words(self) -> tuple[str, ...]:
        """What to run: what is due or some days of it; once all is loaded, a day that is restated."""
        if not self.dirty and not self._is_loaded():
            first = self.chance.randrange(self.served.feed.days)
            return self.chance.choice([("run", *RESOURCES), self.again(first, 3)])
        number = self.chance.randrange(self.served.feed.days)
        if len(self.dirty) > 2:
            number = self.chance.choice(sorted(self.dirty))
        elif number not in self.dirty:
            self.served.feed.revisions[number] += 1
            self.dirty.add(number)
            self.count["restated days"] += 1
        return self.again(number)

    def again(self, number: int, days: int = 1) -> tuple[str, ...]:
        """The command that reads this day again, and those after it."""
        day = self.served.feed.day(number)
        return ("run", "--start", str(day), "--end", str(day + timedelta(days=days)), *RESOURCES)

    def _is_loaded(self) -> bool:
        """Whether every day was loaded once; as far as the published copy tells."""
        try:
            found = ask(
                self.runs.settings,
                "select count(*) from ops.loads where is_current and resource = 'billing_events'",
            )
        except Exception:  # noqa: BLE001  # nothing is published yet, or the server is away
            return False
        return bool(found[0][0] >= self.served.feed.days)

    def moment(self) -> float:
        """How long to let a run go on; now and then long enough to build and publish."""
        return self.chance.expovariate(1 / self.pace) * self.chance.choice((0.3, 0.3, 1, 1, 8))

    def kill(self) -> None:
        """SIGKILL a run at a random moment."""
        words = self.words()
        pid = self.runs.start(*words)
        if self.runs.ended(pid, self.moment()) is None and self.runs.kill(pid):
            self.count["kills"] += 1

    def take_over(self) -> None:
        """Kill who holds the warehouse, some after a pause, while another waits for it."""
        words = self.words()
        pids = [self.runs.start(*words) for _ in range(2)]
        holder = self._holder_among(pids)
        if holder is not None:
            if self.chance.random() < 0.5:
                os.kill(holder, signal.SIGSTOP)
                time.sleep(0.5)
            if self.server and self.chance.random() < 0.5:
                self._end_session()  # the zombie lives on, its lock does not
                os.kill(holder, signal.SIGCONT)
                self.count["takeovers"] += 1
            elif self.runs.kill(holder):
                self.count["takeovers"] += 1
                pids.remove(holder)
        for pid in pids:
            if self.runs.ended(pid, self.moment()) is None and self.runs.kill(pid):
                self.count["kills"] += 1

    def _holder_among(self, pids: list[int]) -> int | None:
        """Which of them holds the warehouse, as soon as one does."""
        until = time.monotonic() + 10 * self.pace
        while time.monotonic() < until:
            holder = self._holder()
            if holder in pids:
                return holder
            time.sleep(0.005)
        return None

    def _holder(self) -> int | None:
        if self.server:
            with suppress(psycopg.Error):
                ((told,),) = self._asked("select holder from ops.warehouse")
                return int(str(told).rpartition("process ")[2].split()[0])
            return None
        try:
            path = self.runs.settings.warehouse.removeprefix("duckdb:///") + ".holder"
            return int(json.loads(Path(path).read_bytes())["pid"])
        except (OSError, ValueError):
            return None

    def _end_session(self) -> None:
        with suppress(psycopg.Error):
            self._asked(
                "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and granted"
            )

    def _asked(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.runs.settings.warehouse, autocommit=True) as connection:
            return connection.execute(sql).fetchall()

    def fill(self) -> None:
        """Leave hardly any room on the disk for a while."""
        pid = self.runs.start(*self.words())
        self.runs.ended(pid, self.chance.random() * self.pace)
        leave_room(self.disk, self.chance.randrange(2 * 2**20))
        code = self.runs.ended(pid, 3 * self.pace)
        remount(self.disk, DISK_BYTES)
        self.count["fills"] += 1
        self.count["fills that a run ended with 1 for"] += code == 1
        if code is None and self.runs.ended(pid, self.moment()) is None and self.runs.kill(pid):
            self.count["kills"] += 1

    def kill_server(self) -> None:
        """SIGKILL to all of PostgreSQL under a run; then start it again."""
        assert self.server is not None
        postgres, service = self.server
        pid = self.runs.start(*self.words())
        self.runs.ended(pid, self.moment())
        service.kill()
        self.count["server kills"] += 1
        self.runs.ended(pid, self.chance.random() * self.pace)
        (postgres.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        service.start()
        wait_for("PostgreSQL is back", lambda: self._is_up() or None, seconds=120, every=0.1)
        if self.runs.ended(pid, self.moment()) is None and self.runs.kill(pid):
            self.count["kills"] += 1

    def _is_up(self) -> bool:
        try:
            return bool(self._asked("select 1"))
        except psycopg.Error:
            return False

    def settle(self) -> None:
        """No more faults: one run for what is due must do, and one for each day restated since."""
        self.served.is_broken.value = 0
        assert self.runs.whole("run", *RESOURCES) == 0, "the first clean run did not end well"
        for number in sorted(self.dirty):
            assert self.runs.whole(*self.again(number)) == 0, number


def leave_room(disk: Path, room: int) -> None:
    """Let no more than so many bytes be free, while others write."""
    while True:
        with suppress(subprocess.CalledProcessError):  # smaller than what is used by now
            remount(disk, shutil.disk_usage(disk).used + room + 4096)
            return


def remount(disk: Path, size: int) -> None:
    """Give the tmpfs another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)


# --- What is left ---------------------------------------------------------------------------------


def differences(settings: Settings, feed: Feed) -> dict[str, int]:
    """Charges and lines of usage that are lost, doubled or wrong in what readers see."""
    found = Counter({"events": 0, "lost": 0, "doubled": 0, "wrong": 0})
    for number in range(feed.days):
        day = feed.day(number)
        served = Counter(
            (one.at.replace(tzinfo=None), one.request_id, one.endpoint_id,
             rounded(Decimal(quantity(one.endpoint_id, one.units))), Decimal(money(one.nano)))
            for one in feed.events(number)
        )  # fmt: skip
        held = Counter(
            ask(
                settings,
                "select requested_at, request_id, endpoint_id, quantity, cost_total "
                f"from marts.fct_billing_event where usage_date = date '{day}'",
            )
        )
        lines = Counter(
            {
                (
                    day,
                    hour,
                    endpoint_id,
                    Decimal(unit_price(endpoint_id, price)),
                    rounded(Decimal(quantity(endpoint_id, count))),
                ): 1
                for (hour, endpoint_id, price), count in feed.by_hour(number).items()
            }
        )
        used = Counter(
            ask(
                settings,
                "select usage_date, cast(extract(hour from used_at) as integer), endpoint_id, "
                f"unit_price, quantity from marts.fct_usage where usage_date = date '{day}'",
            )
        )
        found["events"] += held.total()
        for ours, theirs in ((held, served), (used, lines)):
            surplus = ours - theirs
            found["lost"] += (theirs - ours).total()
            found["doubled"] += sum(n for row, n in surplus.items() if row in theirs)
            found["wrong"] += sum(n for row, n in surplus.items() if row not in theirs)
    return dict(found)


@contextmanager
def readers(settings: Settings, many: int, log: Path) -> Iterator[list[tuple[int, list[str]]]]:
    """So many who look at what is published all the time; at the end, what each has seen."""
    url = settings.warehouse
    if url.startswith("duckdb:"):
        url = str(Path(url.removeprefix("duckdb:///")).with_name("spend.duckdb"))
    seen: list[tuple[int, list[str]]] = []
    with log.open("ab") as errors:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.reading_on", url, "0.5", "patiently"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )
            for _ in range(many)
        ]  # fmt: skip
    try:
        yield seen
    finally:
        for process in processes:
            said, _ = process.communicate()
            seen.append(tuple(json.loads(said)) if said else (0, ["it died"]))


# --- The trial ------------------------------------------------------------------------------------


def trial(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything; returns the figures."""
    days = min(MOST_DAYS, max(10, asked.events // 100_000))
    per_day = asked.events // days
    first = datetime.now(UTC).date() - timedelta(days=days + 2)
    feed = Feed(first, days, per_day, min(PAGE_ROWS, per_day // 10))
    chance = random.Random(asked.seed)  # noqa: S311  # a repeatable test, not secrecy
    figures: dict[str, Any] = {
        "seed": asked.seed,
        "events": asked.events,
        "pages": days * feed.pages_per_day,
    }
    with ExitStack() as stack:
        served = stack.enter_context(serving(feed, asked.seed, asked.share))
        disk = folder / "disk"
        disk.mkdir(mode=0o755)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "chaos", disk], check=True
        )
        stack.callback(lambda: subprocess.run(["umount", "--lazy", disk], check=False))
        server = stack.enter_context(private_postgres(disk)) if asked.postgres else None

        def runs(name: str) -> Runs:
            home = disk / name
            (home / "tmp").mkdir(parents=True)
            url = f"duckdb:///{home / 'warehouse.duckdb'}"
            if server:
                url = server[0].new_database(name)
            settings = Settings.isolated(
                key=FULL_KEY, api_url=served.url, warehouse=url, landing=str(home / "landing"),
                first_days=days + 2,
            )  # fmt: skip
            return Runs(settings, home / "tmp", folder / f"{name}.log", asked.gate)

        if not asked.no_undisturbed:
            alone = runs("undisturbed")
            started = time.monotonic()
            assert alone.whole("run", *RESOURCES) == 0, alone.log.read_text()[-2000:]
            figures |= {
                "undisturbed_s": round(time.monotonic() - started),
                "undisturbed_mib": alone.peak_mib,
            }
            figures["undisturbed_pages"] = served.fetched
            shutil.rmtree(disk / "undisturbed")
        before, started = served.fetched, time.monotonic()
        mine = runs("chaos")
        chaos = Chaos(mine, served, disk, chance, asked.pace, server)
        served.is_broken.value = 1
        with readers(mine.settings, asked.readers, folder / "readers.log") as seen:
            for step in schedule(asked, chaos):
                step()
                shutil.rmtree(mine.temporary, ignore_errors=True)  # what killed runs left of staging
                mine.temporary.mkdir()
            chaos.settle()
        figures["chaos_s"] = round(time.monotonic() - started)
        figures |= {**chaos.count, "exit_codes": dict(mine.codes), "peak_mib": mine.peak_mib}
        figures["faults"] = sum(served.faults)
        figures["kinds_of_faults"] = sum(n > 0 for n in served.faults)
        figures["pages_fetched"] = served.fetched - before
        reread = figures.get("restated days", 0) * feed.pages_per_day
        figures["pages_fetched_again"] = figures["pages_fetched"] - figures["pages"] - reread
        figures["reader_looks"] = sum(looks for looks, _ in seen)
        figures["readers_who_saw_wrong"] = [wrong for _, wrong in seen if wrong]
        figures |= differences(mine.settings, feed)
        sys.stderr.write(f"{figures}\n")  # whatever the laws say of it
        laws.check_laws(mine.settings, {str(feed.day(n)) for n in chance.sample(range(days), 5)})
        assert mine.whole("verify") == 0, mine.log.read_text()[-2000:]
    return figures


def schedule(asked: argparse.Namespace, chaos: Chaos) -> Iterator[Callable[[], None]]:
    """What to do next, by chance, until everything was done as often as was asked for."""
    wanted = {
        "kills": (asked.kills, chaos.kill),
        "takeovers": (asked.takeovers, chaos.take_over),
        "fills": (asked.fills, chaos.fill),
        "server kills": (asked.server_kills if asked.postgres else 0, chaos.kill_server),
    }
    while True:
        left = [step for name, (many, step) in wanted.items() for _ in range(many - chaos.count[name])]
        if not left:
            return
        yield chaos.chance.choice(left)


@contextmanager
def private_postgres(disk: Path) -> Iterator[tuple[Postgres, Service]]:
    """A server whose data lie on the disk that fills."""
    server = Postgres(disk / "server", free_ports(1)[0], role="faletl")
    with server.running() as service:
        yield server, service


def main() -> None:
    """Run a trial and print its figures; ends with 1 when anything was lost, doubled or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--takeovers", type=int, default=50)
    parser.add_argument("--fills", type=int, default=20)
    parser.add_argument("--server-kills", type=int, default=10, help="of PostgreSQL")
    parser.add_argument("--readers", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.1, help="of the answers that are broken")
    parser.add_argument(
        "--pace", type=float, default=3.0, help="mean seconds that a run is left to live"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--gate", action="store_true", help="with Great Expectations")
    parser.add_argument(
        "--no-undisturbed", action="store_true", help="leave out the run to compare with"
    )
    asked = parser.parse_args()
    if NAMESPACE not in os.environ:
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.environ[NAMESPACE] = "1"
        command = ["unshare", *as_root, "--mount", sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
        os.execvp(command[0], [*command, "--seed", str(asked.seed)])  # noqa: S606
    if asked.gate:
        importlib.import_module("faletl.gate.gate")  # once, for all children
    sys.stderr.write(f"seed {asked.seed}\n")
    folder = Path(tempfile.mkdtemp(prefix="faletl-chaos-"))
    folder.chmod(0o755)
    figures = trial(asked, folder)
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.write("".join(f"{name:>34}  {value}\n" for name, value in figures.items()))
    if any(figures[name] for name in ("lost", "doubled", "wrong", "readers_who_saw_wrong")):
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
