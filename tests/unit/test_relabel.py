"""The label of today of what landed under an older one, after any story of binding and renaming."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from faletl.landing.decisions import AccountBound, AccountForgotten, AccountRenamed, Decision
from faletl.line.relabel import label_now

START = datetime(2026, 11, 1, tzinfo=UTC)
LABELS = st.sampled_from(["acme", "beta", "emea"])
STEPS = st.one_of(
    st.tuples(st.just("bind"), LABELS),
    st.tuples(st.just("rename"), LABELS, LABELS),
    st.tuples(st.just("forget"), LABELS),
    st.tuples(st.just("land"), LABELS),
)


class Story:
    """Accounts as numbers: who has each label now, who had it last, and what landed of whom."""

    def __init__(self) -> None:
        self.made: list[Decision] = []
        self.now: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.landed: list[tuple[str, datetime, int]] = []
        self.at = START
        self.accounts = 0

    def bind(self, label: str) -> None:
        """A new account of that label, if it is free; else another key of the account that has it."""
        self.made.append(AccountBound(decided_at=self.at, account=label))
        if label not in self.now:
            self.accounts += 1
            self.now[label] = self.last[label] = self.accounts

    def rename(self, old: str, new: str) -> None:
        """As `faletl accounts rename`, which refuses what cannot be meant."""
        if old in self.now and new not in self.now:
            self.made.append(AccountRenamed(decided_at=self.at, account=old, new_account=new))
            self.now[new] = self.last[new] = self.now.pop(old)

    def forget(self, label: str) -> None:
        """As `faletl accounts forget`."""
        if self.now.pop(label, None) is not None:
            self.made.append(AccountForgotten(decided_at=self.at, account=label))

    def land(self, label: str) -> None:
        """An extract of the account that has the label, or of a run of the one that had it last."""
        if label in self.last:
            self.landed.append((label, self.at, self.last[label]))


@given(st.lists(STEPS, max_size=12), st.booleans())
def test_what_landed_has_the_label_that_its_account_has_now(
    steps: list[tuple[str, ...]], has_older: bool
) -> None:
    story = Story()
    if has_older:  # an older faletl loaded acme, and wrote down no decision
        story.bind("acme")
        story.made.clear()
    for name, *given_ in steps:
        story.at += timedelta(minutes=1)
        getattr(story, name)(*given_)
    labels = {account: label for label, account in story.now.items()}
    for label, at, account in story.landed:
        assert label_now(story.made, label, at) == labels.get(account), (label, at)


def test_a_clock_that_is_behind_does_not_undo_a_rename() -> None:
    late, early = START + timedelta(seconds=3), START + timedelta(seconds=1)
    made: list[Decision] = [
        AccountBound(decided_at=early, account="acme"),
        AccountRenamed(decided_at=early + timedelta(microseconds=1), account="acme", new_account="emea"),
    ]
    assert label_now(made, "acme", late) == "emea"  # landed before, by a clock that was ahead
