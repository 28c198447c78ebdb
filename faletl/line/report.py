"""The report of a run: the outcome of each window, failures, build and publication."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from faletl.errors import FaletlError, HeldError
from faletl.line import holds
from faletl.line.plan import Task
from faletl.line.replace import Replaced
from faletl.models.build import Build
from faletl.resources import RESOURCES
from faletl.staging.window import Staged
from faletl.windows import Window

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the current step, the number of its windows that are done, and their total."""


def no_progress(_what: str, _done: int, _of: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class WindowResult:
    """The outcome of one window: landed, loaded, unchanged (the same rows again), superseded or held."""

    resource: str
    window: Window
    outcome: str
    rows: int
    path: Path


@dataclass(slots=True)
class Report:
    """The results and failures of a step."""

    run_id: str
    account: str | None = None
    outcomes: list[WindowResult] = field(default_factory=list)
    failures: list[tuple[Task | None, FaletlError]] = field(default_factory=list)
    build: Build | None = None
    published: str | None = None

    @property
    def exit_code(self) -> int:
        """The highest of its failures' exit codes, 0 without any (README, "Exit codes")."""
        return max((error.exit_code for _, error in self.failures), default=0)


def note_outcome(report: Report, staged: Staged, replaced: Replaced) -> None:
    """Add the outcome of a window; warn of lost rows, and add a failure if a person must decide."""
    manifest = staged.landed.manifest
    name, window = manifest.resource, manifest.window
    report.outcomes.append(result_of(staged, replaced.outcome))
    log.info("%s, window %s: %s rows, %s, proof %s", name, window, f"{staged.rows:,}", replaced.outcome,
             staged.proof)  # fmt: skip
    loss = replaced.loss
    if loss is None:
        return
    if replaced.outcome != "held":
        log.warning("%s, window %s: fal removed rows or charges: %s were loaded before, and %s "
                    "are loaded now (see ops.restatements)", name, window, loss.before,
                    loss.after)  # fmt: skip
        return
    sentence = holds.sentence(manifest, loss)
    if loss.is_final:
        log.warning("%s, window %s: %s", name, window, sentence)
        return
    error = HeldError(sentence, resource=name, window=str(window), account=manifest.account)
    report.failures.append((Task(RESOURCES[name], window), error))


def result_of(staged: Staged, outcome: str) -> WindowResult:
    """Return the result for a staged window."""
    window = staged.landed.manifest.window
    return WindowResult(staged.resource.name, window, outcome, staged.rows, staged.landed.folder)


def new_run_id() -> str:
    """Return a sortable id: UTC start time plus 24 random bits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
