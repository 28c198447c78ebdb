"""What a public forge reads: workflows, forms, the release; rules that no schema and no linter has."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from docs.release import notes, require_publishable
from faletl.resources import RESOURCES

ROOT = Path(__file__).parents[2]
FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((FORGE / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def parsed(path: Path) -> Any:
    """The document."""
    return YAML(typ="safe").load(path)


def steps(path: Path) -> list[dict[str, Any]]:
    """The steps of all jobs."""
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


# --- Workflows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*FORGE.rglob("*.*"), *(ROOT / ".ci").glob("*/*.json")], ids=str)
def test_nothing_of_the_forge_names_a_host(path: Path) -> None:
    assert not re.search(r"://|\b[a-z0-9-]+\.(org|com|io|net|dev)\b", path.read_text("utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_by_commit_and_run_targets_of_the_makefile_alone(path: Path) -> None:
    text = path.read_text("utf-8")
    pins = re.findall(r"uses: (.*)", text)
    assert pins
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", pin) for pin in pins)
    commands = [step["run"] for step in steps(path) if "run" in step]
    allowed = r'make "\$TARGET"|make [a-z-]+|\.ci/packages( [a-z-]+)*|gh release create .*'
    assert all(re.fullmatch(allowed, command) for command in commands), commands
    named = {command.split()[1] for command in commands if re.fullmatch("make [a-z-]+", command)}
    assert named <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_hold_no_secret_and_write_only_where_no_code_of_ours_runs(path: Path) -> None:
    document = parsed(path)
    assert "secrets." not in path.read_text("utf-8")
    assert set(document["permissions"].values()) <= {"read"}
    for job in document["jobs"].values():
        runs_ours = any("make" in step.get("run", "") for step in job["steps"])
        writes = "write" in job.get("permissions", {}).values()
        assert not (runs_ours and writes)


def test_workflows_name_targets_that_the_makefile_has_and_every_python_that_is_supported() -> None:
    matrix = parsed(FORGE / "workflows" / "ci.yml")["jobs"]["make"]["strategy"]["matrix"]
    assert {*matrix["target"], *(one["target"] for one in matrix["include"])} <= TARGETS
    described = (ROOT / "pyproject.toml").read_text("utf-8")
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: ([\d.]+)"', described)
    heavy = (FORGE / "workflows" / "heavy.yml").read_text("utf-8")
    weekly = re.findall(r"'\[(\"test-postgres.*?)\]'", heavy)[0].replace('"', "").split(", ")
    by_hand = parsed(FORGE / "workflows" / "heavy.yml")["on"]["workflow_dispatch"]["inputs"]["target"]
    assert {*weekly} < {*by_hand["options"]} <= TARGETS


# --- Forms ----------------------------------------------------------------------------------------


def test_forms_ask_for_what_an_answer_needs() -> None:
    labels = {
        path.stem: {field["attributes"].get("label") for field in parsed(path)["body"]} for path in FORMS
    }
    assert labels["bug"] >= {"faletl --version", "faletl status --json"}
    assert labels["unexpected-answer"] >= {"faletl --version", "The scrubbed page"}
    (resource,) = (
        field for field in parsed(FORGE / "ISSUE_TEMPLATE" / "unexpected-answer.yml")["body"]
        if field.get("id") == "resource"
    )  # fmt: skip
    assert resource["attributes"]["options"] == [*RESOURCES]


@pytest.mark.parametrize("kind", ["github-workflows", "github-issue-forms"])
def test_lint_refuses_a_broken_file(kind: str, tmp_path: Path) -> None:
    path = WORKFLOWS[0] if kind == "github-workflows" else FORMS[0]
    broken = tmp_path / path.name
    broken.write_text(re.sub("runs-on|description", "run-on", path.read_text("utf-8")))
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "lint", f"VENV={sys.prefix}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.replace("\\\n", "")  # fmt: skip
    (line,) = (line for line in recipe.splitlines() if f"vendor.{kind}" in line)
    words = line.split()[:3]
    for file, code in ((path, 0), (broken, 1)):
        done = subprocess.run([*words, str(file)], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == code, done.stdout


# --- Release --------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## Unreleased

- Later.

## 1.2.0 - 2026-12-01

### Added

- This.

## 1.1.0 - 2026-11-01

- Earlier.
"""


def test_release_notes_are_the_section_of_the_version_that_the_tag_names() -> None:
    assert notes("v1.2.0", "1.2.0", CHANGELOG) == "### Added\n\n- This.\n"
    assert notes("v1.1.0", "1.1.0", CHANGELOG) == "- Earlier.\n"


@pytest.mark.parametrize(
    ("tag", "version", "said"),
    [
        ("v1.2.0", "1.3.0", "tag v1.3.0"),
        ("1.2.0", "1.2.0", "tag v1.2.0"),
        ("", "1.2.0", "tag v1.2.0"),
        ("v1.3.0", "1.3.0", "CHANGELOG.md needs a heading"),
        ("v1.2", "1.2", "CHANGELOG.md needs a heading"),
    ],
)
def test_release_refuses_a_tag_of_another_version_and_one_that_the_changelog_lacks(
    tag: str, version: str, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        notes(tag, version, CHANGELOG)


def pack(folder: Path, metadata: str, version: str = "1.2.0") -> None:
    """A wheel and a source archive that hold metadata and nothing else."""
    with zipfile.ZipFile(folder / f"faletl-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"faletl-{version}.dist-info/METADATA", metadata)
    with tarfile.open(folder / f"faletl-{version}.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"faletl-{version}/PKG-INFO")
        member.size = len(metadata)
        archive.addfile(member, io.BytesIO(metadata.encode()))


METADATA = "Metadata-Version: 2.4\nName: faletl\nVersion: {}\nRequires-Python: {}\n"


@pytest.mark.parametrize(
    ("metadata", "other", "said"),
    [
        (METADATA.format("1.2.0", ">=3.11"), None, None),
        (METADATA.format("1.1.0", ">=3.11"), None, "are of faletl 1.1.0"),
        (METADATA.format("1.2.0", "eleven"), None, "would refuse the metadata of faletl-1.2.0-py3"),
        (METADATA.format("1.2.0", ">=3.11"), "notes.md", "has \\["),
    ],
    ids=["right", "another version", "no version of Python", "something else"],
)
def test_release_publishes_one_wheel_and_one_source_archive_that_an_index_takes(
    metadata: str, other: str | None, said: str | None, tmp_path: Path
) -> None:
    pack(tmp_path, metadata)
    if other:
        (tmp_path / other).touch()
    if said is None:
        require_publishable(tmp_path, "1.2.0")
        return
    with pytest.raises(ValueError, match=said):
        require_publishable(tmp_path, "1.2.0")
