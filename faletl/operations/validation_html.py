"""Write the results of the gate as self-contained HTML pages.

Great Expectations has its own Data Docs. They load styles and scripts from a dozen hosts and insert
values without escaping, even a script in an endpoint id; these pages do neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from faletl import __version__
from faletl.errors import StorageError
from faletl.findings import Validation
from faletl.operations.validate import GateReport, JudgedWindow
from faletl.resources import RESOURCES

_SEVERITIES = ("critical", "warning", "info")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --critical: #cf222e;
  --warning: #bf6a02; --info: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --good: #3fb950; --critical: #ff7b72; --warning: #e3a03f; --info: #79c0ff; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; }
td:nth-child(-n+3) { overflow-wrap: normal; }
code { font: 13px ui-monospace, monospace; } a { color: inherit; }
.good { color: var(--good); } .critical { color: var(--critical); } .warning { color: var(--warning); }
.info { color: var(--info); } .muted { opacity: .7; }
"""


def write_docs(folder: Path, report: GateReport) -> Path:
    """Write `index.html` and a page for each resource; return the path of `index.html`.

    Raises:
        StorageError: the folder cannot be written.
    """
    by_resource = {
        name: windows
        for name in RESOURCES
        if (windows := [judged for judged in report.judged if judged.resource == name])
    }
    pages = {"index.html": _index(report, by_resource)}
    pages |= {f"{name}.html": _resource(name, judged) for name, judged in by_resource.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, page in pages.items():
            (folder / name).write_text(page, "utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from None
    return folder / "index.html"


def _index(report: GateReport, by_resource: dict[str, list[JudgedWindow]]) -> str:
    lines = [
        (
            f'<a href="{name}.html">{name}</a>',
            f"{len(judged):,}",
            f"{sum(window.rows for window in judged):,}",
            *(_count(judged, severity) for severity in _SEVERITIES),
        )
        for name, judged in by_resource.items()
    ]
    return _page(
        "Results of the gate",
        _table(("resource", "#windows", "#rows", *(f"#{name}" for name in _SEVERITIES)), lines),
        "<h2>Not as expected</h2>",
        _failures(report.judged, with_info=False),
        f'<p class="muted">Run {escape(report.run_id)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>',
    )


def _resource(name: str, judged: Sequence[JudgedWindow]) -> str:
    by_expectation: dict[str, list[Validation]] = {}
    for window in judged:
        for validation in window.validations:
            by_expectation.setdefault(validation.expectation, []).append(validation)
    lines = [
        (
            escape(expectation),
            f'<span class="{validations[0].severity}">{validations[0].severity}</span>',
            f"{len(validations):,}",
            _mark(sum(not validation.success for validation in validations), validations[0].severity),
        )
        for expectation, validations in by_expectation.items()
    ]
    windows = [
        (
            escape(str(window.window)),
            f"<code>{escape(window.load_id)}</code>",
            f"{window.rows:,}",
            f"{len(window.validations):,}",
            _mark(len(_failed(window)), _worst(window)),
        )
        for window in reversed(judged)
    ]
    return _page(
        name,
        f"<p>{escape(RESOURCES[name].comment)}</p>",
        "<h2>Expectations</h2>",
        _table(("expected is that", "severity", "#windows", "#failed in"), lines),
        "<h2>Not as expected</h2>",
        _failures(judged),
        "<h2>Windows</h2>",
        _table(("window", "load", "#rows", "#expectations", "#failed"), windows),
        '<p><a href="index.html">All resources</a></p>',
    )


def _failures(judged: Iterable[JudgedWindow], *, with_info: bool = True) -> str:
    """Return the table of failed expectations, the worst first; `info` ones only `with_info`."""
    failed = [
        (window, v) for window in judged for v in _failed(window) if with_info or v.severity != "info"
    ]
    if not failed:
        return '<p class="good">Nothing: every expectation is met.</p>'
    lines = [
        (
            f'<span class="{v.severity}">{v.severity}</span>',
            window.resource,
            escape(str(window.window)),
            f"{escape(v.expectation)}, but {escape(v.observed)}",
            "<br>".join(f"<code>{escape(key)}</code>" for key in _keys(v)),
        )
        for window, v in sorted(failed, key=lambda each: _SEVERITIES.index(each[1].severity))
    ]
    return _table(("severity", "resource", "window", "expected was that", "examples"), lines)


def _keys(validation: Validation) -> Iterator[str]:
    for key in json.loads(validation.sample_keys):
        yield ", ".join(f"{name.lstrip('_')} {value}" for name, value in key.items())


def _failed(judged: JudgedWindow) -> list[Validation]:
    return [v for v in judged.validations if not v.success]


def _worst(judged: JudgedWindow) -> str:
    severities = {v.severity for v in _failed(judged)}
    return next((severity for severity in _SEVERITIES if severity in severities), "good")


def _count(judged: Sequence[JudgedWindow], severity: str) -> str:
    return _mark(sum(window.failures(severity) for window in judged), severity)


def _mark(count: int, severity: str) -> str:
    return f'<span class="{severity if count else "good"}">{count:,}</span>'


def _table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return an HTML table. The name of a numeric column begins with #. Cells are HTML."""

    def row(tag: str, cells: Sequence[str]) -> Iterator[str]:
        for name, cell in zip(names, cells, strict=True):
            yield f"<{tag}{' class=n' if name.startswith('#') else ''}>{cell}</{tag}>"

    head = "".join(row("th", [name.removeprefix("#") for name in names]))
    body = "".join(f"<tr>{''.join(row('td', line))}</tr>\n" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _page(title: str, *parts: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>faletl: {escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            f'<p class="muted">faletl {__version__}</p></body></html>\n',
        )
    )
