"""Any story of an account, of faults and of kills ends, after one clean run, as fal last served it.

Hypothesis makes up the story: rows come late, are restated or taken back, prices change, answers break,
fal shows less than there is, runs are killed at any step, two run at once, the clock goes on, the
warehouse is rebuilt. After each step readers see sums that agree; at the end the tables are those of the
oracle, row by row (tests/truth.py), and the laws hold (tests/laws.py). A few stories are told each time;
`make soak` tells many long ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path

import time_machine
from hypothesis import HealthCheck, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from faletl import pipeline
from faletl.operations.rebuild import rebuild
from faletl.operations.verify import verify
from faletl.sandbox import BILLING_KEY, FULL_KEY, Conduct, Fault, Request, Sandbox, UsageLine
from faletl.selection import Asked
from tests import laws, truth
from tests.conftest import all_tables, published_path, settings_for
from tests.faults import Faults, break_answers
from tests.forked import Child, Trap, start
from tests.property.accounts import paid_lines, quantities
from tests.property.test_laws import check_against_truth
from tests.truth import FLUX, NOW, line

STORIES, STEPS = (int(number) for number in os.environ.get("STORIES", "3x6").split("x"))
"""How many stories are told, and of how many steps."""

TOLD: Counter[str] = Counter()
"""What happened in all stories so far."""

traps = st.builds(
    Trap,
    st.sampled_from(
        [
            "faletl.landing.extracts.write_durably",
            "faletl.landing.extracts.OpenExtract.seal",
            "faletl.line.extract.stage_window",
            "faletl.line.replace.fence",
            "faletl.line.replace._delete_window",
            "faletl.line.replace._insert",
            "faletl.line.replace._enter",
            "faletl.line.load.replace_window",
            "faletl.models.build._fill",
            "faletl.models.build._check",
            "faletl.line.release.build_models",
            "faletl.warehouse.duckdb.copy_file",
        ]
    ),
    st.sampled_from(["before", "after"]),
    st.integers(1, 9),
)

EXPECTED_CODES = {0, 1, 2, 3, -signal.SIGKILL}


class Story(RuleBasedStateMachine):
    """What happens to one account and its warehouse."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.account = truth.two_days()
        self.now = NOW
        self.account.clock = lambda: self.now
        self.server = Sandbox(self.account, page_size=4)
        self.server.__enter__()
        self.settings = settings_for(self.server.url, self.folder, first_days=3)
        self._break_answers(Faults(0))
        self.faults.is_on = False

    def teardown(self) -> None:
        """The end of every story: one clean run."""
        try:
            self.end()
        finally:
            self.server.__exit__()
            shutil.rmtree(self.folder)

    # --- What fal does ----------------------------------------------------------------------------

    @rule(one=paid_lines)
    def a_row_comes_late(self, one: UsageLine) -> None:
        self.account.lines.append(one)

    @rule(at=st.integers(0, 50), quantity=quantities)
    def a_row_is_restated(self, at: int, quantity: Decimal) -> None:
        if self.account.lines:
            at %= len(self.account.lines)
            old = self.account.lines[at]
            self.account.lines[at] = line(
                old.hour, old.endpoint_id, quantity, str(old.unit_price), unit=old.unit,
                credential=old.credential,
            )  # fmt: skip

    @rule(at=st.integers(0, 50))
    def a_row_is_taken_back(self, at: int) -> None:
        if self.account.lines:
            del self.account.lines[at % len(self.account.lines)]

    @rule(price=st.sampled_from(["0.02", "0.03"]))
    def a_price_changes(self, price: str) -> None:
        self.account.list_price(FLUX, price)

    @rule(seed=st.integers(0, 10**6), share=st.sampled_from([0.05, 0.2]))
    def answers_break_from_now_on(self, seed: int, share: float) -> None:
        self._break_answers(Faults(seed, share))

    @precondition(lambda self: self.faults.is_on)
    @rule()
    def fal_is_well_again(self) -> None:
        self.faults.is_on = False

    @rule(retention_days=st.none() | st.integers(0, 2))
    def fal_serves_only_the_last_days(self, retention_days: int | None) -> None:
        self.server.conduct = Conduct(retention_days=retention_days)

    @rule(hours=st.integers(1, 3))
    def fal_shows_no_day_that_has_ended(self, hours: int) -> None:
        self.server.conduct = Conduct(brown_outs=[(self.now, self.now + timedelta(hours=hours))])

    @rule()
    def the_key_is_rotated(self) -> None:
        new = BILLING_KEY if self.settings.key.get_secret_value() == FULL_KEY else FULL_KEY  # type: ignore[union-attr]
        self.server.keys = {new: "FULL"}
        self.settings = settings_for(self.server.url, self.folder, first_days=3, key=new)

    @rule(passed=st.sampled_from([timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)]))
    def time_passes(self, passed: timedelta) -> None:
        self.now += passed

    # --- What we do -------------------------------------------------------------------------------

    @rule(trap=st.none() | traps)
    def a_run(self, trap: Trap | None) -> None:
        self._finish(self._start(trap, "run"))

    @rule(trap=st.none() | traps, first=st.integers(21, 23))
    def a_backfill(self, trap: Trap | None, first: int) -> None:
        self._finish(self._start(trap, f"run --start 2026-11-{first} --end 2026-11-{first + 1}"))

    @rule(trap=st.none() | traps)
    def two_runs_at_once(self, trap: Trap | None) -> None:
        both = [self._start(trap, "run"), self._start(None, "run --start 2026-11-22")]
        for child in both:
            self._finish(child)

    @precondition(lambda self: published_path(self.settings).exists())
    @rule(trap=st.none() | traps)
    def a_rebuild(self, trap: Trap | None) -> None:
        self._finish(self._start(trap, "rebuild"))

    def _break_answers(self, faults: Faults) -> None:
        """Let the server break what it answers; all of it is dated by the clock of the story."""
        self.faults = faults
        break_answers(self.server, faults)
        broken = self.server.fault

        def dated(request: Request) -> Fault:
            fault = (broken and broken(request)) or Fault()
            date = format_datetime(self.now, usegmt=True)  # a rebuild follows fal's clock
            return replace(fault, headers={"Date": date, **fault.headers})

        self.server.fault = dated

    def _start(self, trap: Trap | None, command: str) -> Child:
        self.now += timedelta(seconds=1)
        key = self.settings.key.get_secret_value()  # type: ignore[union-attr]  # there is one
        traps = [trap] if trap else []
        more = {"FALETL_FIRST_DAYS": "3", "FAL_KEY": key, "CLOCK": self.now.isoformat()}
        return start(self.settings, *traps, command=command, **more)

    def _finish(self, child: Child) -> None:
        code, said = child.finish()
        TOLD[f"ended with {code}"] += 1
        note(said)
        assert code in EXPECTED_CODES, said
        assert "Traceback" not in said, said

    # --- What must hold ---------------------------------------------------------------------------

    @invariant()
    def readers_see_one_sum(self) -> None:
        if published_path(self.settings).exists():
            laws.check_money(self.settings)

    def end(self) -> None:
        """A clean run mends all; another one changes nothing; a rebuild makes the same."""
        TOLD["stories"] += 1
        TOLD.update({f"fault: {name}": n for name, n in self.faults.done.items()})
        self.faults.is_on = False
        self.server.conduct = Conduct()
        self.now += timedelta(hours=2)  # nothing that landed before is taken up
        with time_machine.travel(self.now, tick=False) as clock:
            report = pipeline.run(self.settings, Asked(start=truth.day(20)))
            assert report.exit_code == 0, report.failures
            served = replace(self.account, lines=list(self.account.lines))
            check_against_truth(served, self.settings, self.now)
            laws.check_laws(self.settings)
            before = all_tables(self.settings)
            clock.shift(1)
            again = pipeline.run(self.settings, Asked(start=truth.day(20), resources=["usage"]))
            assert {outcome.outcome for outcome in again.outcomes} == {"unchanged"}
            rebuild(self.settings)
            assert all_tables(self.settings) == before
            assert verify(self.settings).findings == []


Story.TestCase.settings = hypothesis_settings(
    max_examples=STORIES,
    stateful_step_count=STEPS,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestStory = Story.TestCase


def teardown_module() -> None:
    """Say what was survived."""
    if "STORIES" in os.environ:
        sys.stderr.write("\n" + "".join(f"{n:>8}  {what}\n" for what, n in TOLD.most_common()))
