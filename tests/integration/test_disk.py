"""Disks that are full, read-only or damaged; too few files, too little memory: said, and mended."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import duckdb
import pytest
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import FaletlError, StorageError, TamperedError, WarehouseBusyError
from faletl.landing import extracts
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import Fault, Sandbox
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from tests import truth
from tests.conftest import all_tables, ask, needs_root, opened, settings_for, total
from tests.forked import Child, Trap, be_traced, fork, needs_strace, start, traced
from tests.servers import wait_for

pytestmark = pytest.mark.duckdb_only("disks of servers are looked at by test_postgres.py")

DAY = Asked(truth.day(21), truth.day(22), ["usage"])
RUN = "run --resource usage --start 2026-11-21 --end 2026-11-22"

NOBODY = 65534
MIB = 2**20


def spent() -> object:
    """What usage of the day cost."""
    return sum(one.cost_total for one in truth.two_days().lines if one.hour.day == 21)


# --- A small disk ---------------------------------------------------------------------------------

_NEW_NAMESPACE, _PRIVATE, _ALL_BELOW, _AGAIN, _READ_ONLY = 0x20000, 1 << 18, 0x4000, 0x20, 1


class SmallDisk:
    """A file system in memory that only this process sees, until its end."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder = folder
        folder.mkdir()
        _call("unshare", _NEW_NAMESPACE)
        _call("mount", b"none", b"/", None, _PRIVATE | _ALL_BELOW, None)
        self._mount(0, options)

    def change(self, options: str, flags: int = 0) -> None:
        """Make it another size, or read-only."""
        self._mount(_AGAIN | flags, options)

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.folder / "ballast").open("ab", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def grow(self) -> None:
        """Make room again."""
        used = shutil.disk_usage(self.folder).used
        self.change(f"size={used + 32 * MIB}")

    def _mount(self, flags: int, options: str) -> None:
        _call("mount", b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, options.encode())


def _call(function: str, *given: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*given):
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


def failed(settings: Settings) -> list[FaletlError]:
    """A run over the day that fails, and may be tried again: its errors."""
    report = pipeline.run(settings, DAY)
    assert report.exit_code == 1, report
    assert report.published is None
    for _, error in report.failures:
        assert error.is_retryable
    return [error for _, error in report.failures]


def check_runs(settings: Settings) -> None:
    """The next run ends in the right tables."""
    report = pipeline.run(settings, DAY)
    assert report.exit_code == 0, report.failures
    assert total(settings) == spent()


def on_a_full_disk(folder: Path) -> None:
    """Fill it at one step after the other; each run gets further than the one before."""
    disk = SmallDisk(folder / "disk", f"size={32 * MIB}")
    tempfile.tempdir = str(disk.folder)
    with Sandbox(truth.two_days(), page_size=4) as server, time_machine.travel(truth.NOW, tick=True):
        settings = settings_for(server.url, disk.folder, parallel=1)
        for function, when, where in (
            ("faletl.warehouse.duckdb._discard", "before", r"the warehouse .*\.new cannot be used"),
            ("faletl.warehouse.schema.create", "after", r"the warehouse .*\.new cannot be used"),
            (
                "faletl.landing.decisions.record",
                "before",
                r"cannot write .*/\.decisions/.*json.* bytes needed",
            ),
            (
                "faletl.landing.extracts.OpenExtract.land",
                "before",
                r"cannot write .*/before-.* bytes needed",
            ),
            (
                "faletl.landing.extracts.OpenExtract.seal",
                "before",
                r"cannot write .*/manifest.json.* bytes needed",
            ),
            (
                "faletl.staging.window.typed_records",
                "before",
                r"staging failed: .*; make room below .*/disk",
            ),
            ("faletl.staging.window.prove", "before", r"staging failed: .*; make room below .*/disk"),
            ("faletl.line.replace.fence", "after", r"the warehouse .*\.duckdb cannot be used"),
            (
                "faletl.landing.extracts.leave_receipt",
                "before",
                r"cannot write .*/loaded.json.* bytes needed",
            ),
            ("faletl.models.build.fence", "after", r"the warehouse .*\.duckdb cannot be used"),
            ("faletl.warehouse.schema.build_to_publish", "after", r"the warehouse .* cannot be used"),
            ("faletl.warehouse.duckdb.copy_file", "before", r"cannot publish .* bytes needed"),
        ):
            Trap(function, when, springs=disk.fill)()
            told = "; ".join(map(str, failed(settings)))
            assert re.search(where, told), told
            assert "No space left on device" in told, told
            assert "bytes free there" in told, told
            disk.grow()
        check_runs(settings)
        leftover = {path.name for path in disk.folder.iterdir()}
        assert leftover == {
            "ballast", "landing", "spend.duckdb", "warehouse.duckdb", "warehouse.duckdb.lock",
        }  # fmt: skip


@needs_root
def test_a_disk_that_is_full_at_any_step_is_said_and_spoils_nothing(tmp_path: Path) -> None:
    check(fork(on_a_full_disk, tmp_path))


def check(child: Child) -> None:
    """It ended well."""
    code, said = child.finish()
    assert code == 0, said


def on_a_disk_that_refuses(folder: Path, url: str) -> None:
    """No more files; read-only; not ours."""
    disk = SmallDisk(folder / "disk", f"size={64 * MIB},nr_inodes=400")
    tempfile.tempdir = str(disk.folder)
    settings = settings_for(url, disk.folder, parallel=1)
    with time_machine.travel(truth.NOW, tick=True):
        for number in range(400):
            with suppress(OSError):
                (disk.folder / f"ballast-{number}").touch()
        (first,) = failed(settings)
        assert "No space left on device" in str(first)
        assert "bytes free there, but no more files" in str(first), first
        for ballast in disk.folder.glob("ballast-*"):
            ballast.unlink()
        check_runs(settings)
        disk.change("", _READ_ONLY)
        assert all("Read-only file system" in str(error) for error in failed(settings))
        disk.change("")
        os.seteuid(NOBODY)
        assert all("Permission denied" in str(error) for error in failed(settings))
        with pytest.raises(StorageError, match=r"cannot read .*: Permission denied"):
            list(extracts.complete_reads(settings))  # none is not the same as nobody knows
        os.seteuid(0)
        check_runs(settings)


@needs_root
def test_a_disk_that_refuses_is_said_and_spoils_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    check(fork(on_a_disk_that_refuses, tmp_path, sandbox.url))


# --- Too little of something else -----------------------------------------------------------------


def limit_descriptors(free: int) -> None:
    """Let this process open so many files more."""
    taken = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + free, taken + free))


def limit_memory(free: int) -> None:
    """Let this process take so many bytes more."""
    taken = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + free, taken + free))


@pytest.fixture
def landed(sandbox: Sandbox, tmp_path: Path) -> Settings:
    """Settings of an account of which a day waits to be loaded."""
    settings = settings_for(sandbox.url, tmp_path, parallel=1)
    with time_machine.travel(truth.NOW, tick=True):
        assert pipeline.extract(settings, DAY).exit_code == 0
    return settings


def test_too_few_descriptors_are_said_and_spoil_nothing(landed: Settings) -> None:
    for free in range(12):
        code, said = start(landed, partial(limit_descriptors, free), command="load").finish()
        if code == 0:
            break
        assert code == 1, said
        assert "Too many open files" in said
        assert "bug" not in said
    assert 0 < free < 11
    with time_machine.travel(truth.NOW, tick=True):
        check_runs(landed)


def test_too_little_memory_is_said_and_spoils_nothing(sandbox: Sandbox, landed: Settings) -> None:
    # With less, a thread that cannot have its own few bytes would end the process where it stands.
    short = Trap(
        "faletl.staging.records._write_typed", "before", springs=partial(limit_memory, 36 * MIB)
    )
    code, said = start(landed, short, command="load").finish()
    assert code == 1, said
    assert re.search(r"staging ran out of memory .*; raise the limit, or lower FALETL_PARALLEL", said)
    sandbox.fault = lambda _: Fault(body=bytes(60 * MIB))
    big = start(landed, partial(limit_memory, 40 * MIB), command=RUN, FALETL_PARALLEL="1")
    code, said = big.finish()
    assert code == 1, said
    assert re.search("out of memory or threads; raise its limit, or lower .* FALETL_MAX_BODY", said)
    assert "Traceback" not in said
    sandbox.fault = None
    with time_machine.travel(truth.NOW, tick=True):
        check_runs(landed)


def redirect(stream: int) -> None:
    """Have what is written there fall on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def test_a_full_disk_below_the_log_stops_nothing(landed: Settings) -> None:
    assert start(landed, partial(redirect, 2), command=RUN).finish()[0] == 0
    assert total(landed) == spent()
    code, said = start(landed, partial(redirect, 1), command="status").finish()
    assert (code, said) == (1, "faletl: the system refused: No space left on device\n")


# --- Flushes --------------------------------------------------------------------------------------


@needs_strace
def test_a_write_or_a_flush_that_fails_is_said_and_nothing_half_done_is_kept(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path, parallel=1)
    extract = RUN.replace("run", "extract")
    of_page = 5  # flushes after those of the folders that are made
    of_load = "fsync failed|Input/output error"  # of DuckDB, or of ours
    for command, call, error, nth, said in (
        (extract, "write", "EDQUOT", 1, "Disk quota exceeded"),  # of each thread; a log may go missing
        (extract, "fsync", "EIO", 1, "Input/output error"),
        (extract, "fsync", "EIO", of_page, "Input/output error"),
        ("load", "fsync", "EIO", 1, of_load),
        ("load", "fsync", "EIO", 2, of_load),
        ("load", "fsync", "EIO", 4, of_load),
    ):
        child = start(settings, be_traced, command=command)
        with traced(child, f"trace={call}", f"inject={call}:error={error}:when={nth}"):
            code, told = child.finish()
        assert code == 1, told
        assert re.search(said, told), told
        assert not list(tmp_path.rglob("*.part"))
        if command == extract:
            assert not list(extracts.complete_reads(settings))
        if nth == of_page:
            with time_machine.travel(truth.NOW, tick=True):
                assert pipeline.extract(settings, DAY).exit_code == 0
    with time_machine.travel(truth.NOW, tick=True):
        check_runs(settings)


@needs_strace
def test_what_has_its_name_has_been_flushed_and_so_has_the_name(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    """What a power cut may lose of a run is what it did not flush: nothing that later steps stand on."""
    settings, log = settings_for(sandbox.url, tmp_path, parallel=1), tmp_path / "calls.log"
    child = start(settings, be_traced, command=RUN)
    with traced(child, "trace=write,pwrite64,sendfile,copy_file_range,fsync,rename,mkdir", log=log):
        check(child)
    unflushed, unnamed, renamed, copied = set[str](), set[str](), list[str](), list[str]()
    for call, paths in calls(log, tmp_path):
        if call in ("write", "pwrite64", "sendfile"):
            unflushed.add(paths[0])
        elif call == "copy_file_range":
            unflushed.add(paths[1])
            copied.append(Path(paths[1]).name)
        elif call == "fsync":
            unflushed.discard(paths[0])
            unnamed = {name for name in unnamed if str(Path(name).parent) != paths[0]}
        elif call == "mkdir":
            unnamed.add(paths[0])
        elif call == "rename":
            assert paths[0] not in unflushed, paths
            if paths[1].endswith(("manifest.json", ".duckdb")):
                assert not unnamed, (paths, unnamed)  # pages, and the folders they are in
            unnamed.add(paths[1])
            renamed.append(Path(paths[1]).name)
    assert not {name for name in unnamed if "/landing" in name or name.endswith(".duckdb")}
    assert sum(name.startswith("rows-") for name in renamed) == 4
    assert renamed.index("manifest.json") < renamed.index("loaded.json")
    assert {"warehouse.duckdb", "spend.duckdb"} <= set(renamed)
    assert ".spend.duckdb.part" in copied


def calls(log: Path, below: Path) -> Iterator[tuple[str, list[str]]]:
    """The system calls that strace saw, by the paths they are about: of files below that folder."""
    begun: dict[str, str] = {}
    for one in log.read_text("utf-8").splitlines():
        thread, _, told = one.partition(" ")
        told = told.strip()
        if " = -1 " in told:
            continue
        if told.endswith("<unfinished ...>"):
            begun[thread] = told
            continue
        if told.startswith("<... "):
            told = begun.pop(thread) + told
        call, _, rest = told.partition("(")
        paths = re.findall(r'[<"](/[^">]*)[>"]', rest)
        if paths and all(path.startswith(str(below)) for path in paths):
            yield call, paths


# --- Pages and files that were damaged ------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    """The lowest bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """With the page after it."""
    other = path.with_name(path.name.replace("-00001.", "-00002."))
    path.rename(path.with_suffix(".aside"))
    other.rename(path)
    path.with_suffix(".aside").rename(other)


def test_a_page_that_was_damaged_before_it_was_loaded_is_named_and_read_again(
    clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path
) -> None:
    settings = settings_for(sandbox.url, tmp_path)
    for damage in (flip_a_bit, lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink, swap):
        clock.shift(60)
        report = pipeline.extract(settings, DAY)
        page = next(report.outcomes[0].path.glob("rows-*-00001.*"))
        damage(page)
        (failure,) = pipeline.load(settings).failures
        assert isinstance(failure[1], TamperedError)
        assert str(page) in str(failure[1])
        with open_warehouse(settings).reading() as connection:
            assert connection is not None
            assert connection.exec_driver_sql("select count(*) from raw.usage").scalar() == 0
    clock.shift(60)
    check_runs(settings)


@pytest.fixture
def loaded(clock: time_machine.Traveller, sandbox: Sandbox, tmp_path: Path) -> Settings:
    """A warehouse with one day of usage, built and published."""
    settings = settings_for(sandbox.url, tmp_path)
    check_runs(settings)
    return settings


def in_every_block(path: Path) -> None:
    """Turn some bytes over in each block of DuckDB's."""
    content = bytearray(path.read_bytes())
    for at in range(3 * 4096 + 1000, len(content), 256 * 1024):
        content[at : at + 64] = bytes(byte ^ 0xFF for byte in content[at : at + 64])
    path.write_bytes(content)


def with_a_log_of_another(path: Path) -> None:
    """Put a .wal of another database beside it."""
    other = path.with_name("other.duckdb")
    crash = f"""
import duckdb, os
connection = duckdb.connect({str(other)!r})
connection.execute("create table a as select 1 as x")
connection.execute("checkpoint")
connection.execute("insert into a values (2)")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", crash], check=True)
    other.with_name("other.duckdb.wal").rename(path.with_name(f"{path.name}.wal"))
    other.unlink()


def of_a_newer_duckdb(path: Path) -> None:
    """Have its header say so, with the checksum that DuckDB asks for."""
    content = bytearray(path.read_bytes())
    content[12:20] = (100).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(duckdb.IOException) as refused:
        duckdb.connect(str(path))
    (asked,) = re.findall(r"computed checksum (\d+)", str(refused.value))
    content[:8] = int(asked).to_bytes(8, "little")
    path.write_bytes(content)


def of_sqlite(path: Path) -> None:
    """Another kind of database."""
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table a (x)")
        connection.commit()


def test_a_damaged_warehouse_is_told_by_name_and_made_anew_from_its_pages(
    loaded: Settings, sandbox: Sandbox, tmp_path: Path
) -> None:
    path = tmp_path / "warehouse.duckdb"
    before, good, asked = all_tables(loaded), path.read_bytes(), len(sandbox.requests)
    damages: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: path.write_bytes(b""), "not a valid DuckDB"),
        (lambda path: path.write_bytes(good[: len(good) // 2]), "Could not read enough bytes"),
        (lambda path: path.write_bytes(bytes(len(good))), "not a valid DuckDB"),
        (lambda path: path.write_bytes(b"not a database"), "not a valid DuckDB"),
        (of_sqlite, "cannot be opened as a DuckDB warehouse"),
        (of_a_newer_duckdb, "version number 100"),
        (flip_the_header, "checksum"),
        (with_a_log_of_another, "replaying WAL"),
        (in_every_block, "checksum"),
    ]
    for damage, said in damages:
        path.write_bytes(good)
        damage(path)
        damaged = path.read_bytes()
        with pytest.raises(TamperedError, match=said) as caught:
            pipeline.build(loaded, full=True)
        assert "faletl rebuild" in str(caught.value)
        assert path.read_bytes() == damaged
        if damage in (with_a_log_of_another, in_every_block):
            rebuild(loaded)
            assert path.with_name("warehouse.duckdb.damaged").read_bytes() == damaged
            assert not path.with_name("warehouse.duckdb.wal").exists()
    assert all_tables(loaded) == before
    assert len(sandbox.requests) == asked


def flip_the_header(path: Path) -> None:
    """Turn bytes of the first block over."""
    content = bytearray(path.read_bytes())
    content[100:164] = bytes(byte ^ 0xFF for byte in content[100:164])
    path.write_bytes(content)


def hold_open(path: Path) -> None:
    """What a tool does that opens the warehouse itself, and not the copy for readers."""
    with duckdb.connect(str(path)):
        print("open", flush=True)
        time.sleep(600)


def test_a_program_that_has_the_warehouse_open_is_named_and_waited_for(
    loaded: Settings, tmp_path: Path
) -> None:
    before = ask(loaded, "from reports.rpt_spend_daily order by all")
    held = fork(hold_open, tmp_path / "warehouse.duckdb")
    wait_for("it is open", lambda: held.said.read_text("utf-8"), seconds=60, every=0.05)
    impatient = loaded.model_copy(update={"lock_seconds": 0.3})
    with pytest.raises(WarehouseBusyError, match=rf"PID {held.pid}.*close it there"):
        pipeline.build(impatient, full=True)
    assert ask(loaded, "from reports.rpt_spend_daily order by all") == before
    waiting = start(loaded, command="build --full", FALETL_LOCK_SECONDS="60")
    held.process.kill()
    held.finish()
    check(waiting)


# --- Tables that somebody altered -----------------------------------------------------------------


def test_tables_that_somebody_altered_are_told_and_made_anew(loaded: Settings, tmp_path: Path) -> None:
    path = tmp_path / "warehouse.duckdb"
    good = path.read_bytes()

    def alter(statement: str) -> None:
        path.write_bytes(good)
        with opened(loaded) as connection:
            connection.execute("update ops.loads set data_version = 9")  # there is something to build
            connection.execute("update ops.warehouse set data_version = 9")
            connection.execute(statement)

    for statement, said in (
        ("alter table raw.usage drop column cost_discount", "cost_discount is gone"),
        ("alter table raw.usage alter cost_total type double", "cost_total is of type double"),
        ("drop table ops.horizons", "ops.horizons is gone"),
    ):
        alter(statement)
        (found,) = verify(loaded).findings
        assert said in found
        with pytest.raises(TamperedError, match=f"{said}.*faletl rebuild"):
            pipeline.build(loaded)
    assert pipeline.run(loaded, DAY).exit_code == 4
    rebuild(loaded)
    assert total(loaded) == spent()

    for statement in ("alter table marts.fct_usage drop column cost_total", "drop table marts.dim_date"):
        alter(statement)
        with pytest.raises(TamperedError, match="faletl build --full"):
            pipeline.build(loaded)
    pipeline.build(loaded, full=True)
    with opened(loaded) as connection:  # in which amounts are bent, and compare equal
        connection.execute("alter table marts.fct_usage alter cost_total type double")
    (found,) = verify(loaded).findings
    assert "marts.fct_usage: the column cost_total is of type double, not decimal(38,12)" in found
    pipeline.build(loaded, full=True)
    with opened(loaded) as connection:
        connection.execute("update marts.fct_usage set usage_date = null where rowid = 0")
    assert "marts.fct_usage: 1 rows have no day" in "; ".join(verify(loaded).findings)
    pipeline.build(loaded, full=True)
    check_runs(loaded)
