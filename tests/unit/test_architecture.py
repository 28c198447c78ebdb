"""The map: docs/architecture.md names what is there, and the package names its public API."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import faletl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MODULES = {
    path.relative_to(ROOT / "faletl").as_posix()
    for path in (ROOT / "faletl").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
}


def test_architecture_names_only_modules_that_exist() -> None:
    named = set(re.findall(r"`(?:faletl/)?([\w/]+\.py)`", PAGE))
    assert named
    assert named - MODULES == set()


def test_architecture_has_a_line_for_every_folder_and_module() -> None:
    listing = PAGE.split("```text\nfaletl/\n")[1].split("```")[0]
    first_words = {line.split()[0] for line in listing.splitlines() if not line.startswith("    ")}
    top = {f"{module.split('/')[0]}/" if "/" in module else module for module in MODULES}
    assert first_words == top
    assert {module for module in MODULES if Path(module).name not in listing} == set()


def test_architecture_names_only_sql_that_exists() -> None:
    named = set(re.findall(r"`(sql/[\w/]+\.sql)`", PAGE))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("name", faletl.__all__)
def test_api_gives_every_public_name(name: str) -> None:
    assert getattr(faletl, name) is not None
    assert name in dir(faletl)


def test_api_stub_declares_the_same_names() -> None:
    stub = (ROOT / "faletl" / "__init__.pyi").read_text("utf-8")
    declared = set(re.findall(r" as (\w+)$", stub, re.MULTILINE)) | {"__version__"}
    assert declared == set(faletl.__all__)


def test_api_has_no_other_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'extraction'"):
        _ = faletl.extraction  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("faletl.plan:Asked", "faletl:Asked"),
        ("faletl.pieces:make_plan", "faletl.line.distributed:write_plan"),
        ("faletl.pieces:load_plan", "faletl.line.distributed:load_plan"),
    ],
)
def test_api_keeps_former_names_with_a_warning(former: str, current: str) -> None:
    with pytest.warns(DeprecationWarning, match=current.replace(":", r"\.")):
        assert pkgutil.resolve_name(former) is pkgutil.resolve_name(current)
    with pytest.raises(AttributeError):
        pkgutil.resolve_name(f"{former}s")


def test_api_is_imported_without_what_its_functions_need() -> None:
    code = "import sys, faletl; sys.exit(bool({'sqlalchemy', 'duckdb', 'httpx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
