"""Many processes over one warehouse: whoever is late, frozen or killed, nothing is lost or doubled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import time_machine

from faletl import landing, pipeline
from faletl import rebuild as rebuilding
from faletl.config import Settings
from faletl.load import Ledger
from faletl.plan import Asked
from tests import truth
from tests.conftest import ask, opened
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
    refuse_gaps = rebuilding._refuse_gaps

    def dies(*_: object) -> None:
        raise Dies

    def meanwhile(ledger: Ledger, past: Sequence[rebuilding.Loaded]) -> None:
        """The rebuild has read the ledger, and waits for the warehouse: the load has it still."""
        refuse_gaps(ledger, past)
        with monkeypatch.context() as patch:
            patch.setattr(landing, "leave_receipt", dies)
            with pytest.raises(Dies):
                pipeline.load(settings)
        monkeypatch.setattr(rebuilding, "_refuse_gaps", refuse_gaps)

    loads = "select count(*) from ops.loads"
    ((before,),) = ask(settings, loads, opened)
    monkeypatch.setattr(rebuilding, "_refuse_gaps", meanwhile)
    rebuilding.rebuild(settings)

    assert ask(settings, loads, opened) == [(before + 1,)]
