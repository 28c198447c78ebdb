"""Many processes over one warehouse: whoever is late, frozen or killed, nothing is lost or doubled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
import time_machine

from faletl import pipeline
from faletl.config import Settings
from faletl.errors import WarehouseBusyError
from faletl.landing import extracts
from faletl.operations import rebuild as rebuilding
from faletl.selection import Asked
from faletl.warehouse import open_warehouse
from faletl.warehouse.ledger import Ledger
from faletl.warehouse.tables import WAREHOUSE
from tests import truth
from tests.conftest import ask, opened, settings_for
from tests.truth import Account, line


class Dies(BaseException):
    """The end of a process, as far as what comes after it in the code goes."""


def test_a_load_that_dies_before_its_receipt_is_not_lost_to_a_rebuild_that_waited_for_it(
    clock: time_machine.Traveller,
    account: Account,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    day = Asked(truth.day(22), truth.day(23), ["usage"])
    pipeline.run(settings, day)
    account.lines.append(line(account.lines[-1].hour, quantity="7"))
    clock.shift(60)
    pipeline.extract(settings, day)
    require_pages = rebuilding._require_pages

    def dies(*_: object) -> None:
        raise Dies

    def meanwhile(_: Settings, ledger: Ledger, past: Sequence[rebuilding.LoadedExtract]) -> None:
        """The rebuild has read the ledger, and waits for the warehouse: the load has it still."""
        require_pages(settings, ledger, past)
        with monkeypatch.context() as patch:
            patch.setattr(extracts, "leave_receipt", dies)
            with pytest.raises(Dies):
                pipeline.load(settings)
        monkeypatch.setattr(rebuilding, "_require_pages", require_pages)

    loads = "select count(*) from ops.loads"
    ((before,),) = ask(settings, loads, opened)
    monkeypatch.setattr(rebuilding, "_require_pages", meanwhile)
    rebuilding.rebuild(settings)

    assert ask(settings, loads, opened) == [(before + 1,)]


def test_whoever_waits_for_a_rebuild_on_a_server_is_told_who_holds_it(
    database: str, tmp_path: Path
) -> None:
    settings = settings_for("http://127.0.0.1:1", tmp_path, warehouse=database)
    impatient = settings.model_copy(update={"lock_seconds": 0.1})
    with open_warehouse(settings).lease("the one before") as lease, lease.transaction():
        lease.connection.execute(sa.update(WAREHOUSE).values(holder="a load (process 1 on nowhere)"))
    # A rebuild is one transaction: what it tells of itself cannot be seen before it is over.
    named = rf"in use by .*process {os.getpid()} on .*, since 20"
    rebuilt = open_warehouse(settings).rebuilding("a rebuild", 0, lambda _: None)
    with rebuilt, pytest.raises(WarehouseBusyError, match=named):
        open_warehouse(impatient).lease("me").__enter__()


ON_FILE, ON_SERVER = pytest.param("397", (), id="file"), pytest.param("70", ("--postgres",), id="server")


@pytest.mark.parametrize(("seed", "where"), [ON_FILE, ON_SERVER])
def test_rounds_of_processes_that_are_killed_frozen_and_cut_off_lose_and_double_nothing(
    seed: str, where: Sequence[str]
) -> None:
    command = [sys.executable, "-m", "tests.exclusion", "--rounds", "2", "--most", "2", "--seed", seed]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *where], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 rounds held" in done.stdout
