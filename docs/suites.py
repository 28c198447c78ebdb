"""The expectations of every resource, as a table for docs/validation.md."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

from faletl.config import Settings
from faletl.gate.gate import Gate
from faletl.resources import RESOURCES, Resource
from faletl.windows import Window

_HEAD = "| expected is that | severity | resources |\n| --- | --- | --- |\n"


_MARKED = re.compile(r"(?<=<!-- made by `make docs` -->\n).*?(?=<!-- end -->)", re.DOTALL)


def document() -> str:
    """Return docs/validation.md with the table of expectations."""
    page = (Path(__file__).parent / "validation.md").read_text("utf-8")
    return _MARKED.sub(lambda _: _table(), page)


def _table() -> str:
    """Return a table of expectations and the resources that have them, in the order of the suites."""
    resources_by_expectation: dict[tuple[str, str], list[str]] = {}
    for name, resource in RESOURCES.items():
        for expectation in _suite(resource):
            resources_by_expectation.setdefault(expectation, []).append(name)
    lines = (
        f"| {description} | {severity} | {_of(names)} |"
        for (description, severity), names in resources_by_expectation.items()
    )
    return _HEAD + "\n".join(lines) + "\n"


def _of(names: list[str]) -> str:
    return "all" if len(names) == len(RESOURCES) else ", ".join(names)


def _suite(resource: Resource) -> Iterator[tuple[str, str]]:
    """Yield descriptions and severities of the suite for a settled window with all optional facts."""
    with tempfile.TemporaryDirectory() as scratch:
        Gate(Settings.isolated(), Path(scratch))  # imports Great Expectations without its output
        from faletl.gate.expectations import PRICED, Facts, suite_of

        day = Window.of_day(date(2026, 11, 22))
        facts = Facts(
            resource=resource,
            window=day if resource.window == "day" else Window.snapshot(datetime.now(UTC)),
            expected_rows=1,
            control_total=Decimal(1) if resource.proof else None,
            is_settled=True,
            units=Path("units.csv"),
            prices=Path("prices.csv") if resource.name in PRICED else None,
            usual_rows=100 if not resource.every_run else None,
        )
        for expectation in suite_of(facts).expectations:
            yield str(expectation.description), expectation.severity.value
