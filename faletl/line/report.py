"""What became of each window in a run."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from faletl.errors import FaletlError, HeldError
from faletl.line import holds
from faletl.line.plan import Task
from faletl.line.replace import Replaced
from faletl.models.build import Build
from faletl.resources import RESOURCES
from faletl.staging.window import Staged
from faletl.windows import Window

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is under way, how many of its windows are done, and of how many."""


def silent(_what: str, _done: int, _of: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one window: landed, loaded, unchanged (the same rows again), superseded or held."""

    resource: str
    window: Window
    outcome: str
    rows: int
    path: Path


@dataclass(slots=True)
class Report:
    """What a step did, and what it could not do."""

    run_id: str
    account: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[tuple[Task | None, FaletlError]] = field(default_factory=list)
    build: Build | None = None
    published: str | None = None

    @property
    def exit_code(self) -> int:
        """The highest of its failures' exit codes, 0 without any (README, "Exit codes")."""
        return max((error.exit_code for _, error in self.failures), default=0)


def note_outcome(report: Report, staged: Staged, replaced: Replaced) -> None:
    """Enter what became of a window; what it lost is a warning, and a failure if a person must look."""
    manifest = staged.landed.manifest
    name, window = manifest.resource, manifest.window
    report.outcomes.append(outcome_of(staged, replaced.outcome))
    log.info("%s, window %s: %s rows, %s, proof %s", name, window, f"{staged.rows:,}", replaced.outcome,
             staged.proof)  # fmt: skip
    loss = replaced.loss
    if loss is None:
        return
    if replaced.outcome != "held":
        log.warning("%s, window %s: fal took rows or charges back: there were %s, and now %s are loaded "
                    "(see ops.restatements)", name, window, loss.before, loss.after)  # fmt: skip
        return
    sentence = holds.sentence(manifest, loss)
    if loss.is_final:
        log.warning("%s, window %s: %s", name, window, sentence)
        return
    error = HeldError(sentence, resource=name, window=str(window), account=manifest.account)
    report.failures.append((Task(RESOURCES[name], window), error))


def outcome_of(staged: Staged, outcome: str) -> Outcome:
    """What became of the staged window."""
    window = staged.landed.manifest.window
    return Outcome(staged.resource.name, window, outcome, staged.rows, staged.landed.folder)


def new_run_id() -> str:
    """When it began, and chance."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
