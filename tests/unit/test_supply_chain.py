"""What is installed is what is locked, what is locked is looked at, and linters refuse to run data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCK, IMAGE_LOCK = ROOT / "requirements.lock", ROOT / "requirements-image.lock"


@cache
def project() -> dict[str, list[str]]:
    """The direct dependencies by the group or extra that they are of."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return {
        "core": described["project"]["dependencies"],
        **described["project"]["optional-dependencies"],
        **described["dependency-groups"],
    }


@cache
def locked(lock: Path = LOCK) -> list[tuple[Requirement, frozenset[str]]]:
    """Each entry of the lock with its hashes."""
    text = re.sub(r"^\s*#.*\n", "", lock.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", "")
    found = []
    for line in text.splitlines():
        named, *hashes = line.split(" --hash=")
        found.append((Requirement(named), frozenset(one.strip() for one in hashes)))
    return found


def recipe(target: str, program: str) -> list[str]:
    """The words of the command in the Makefile that runs that program, for this environment."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target, f"VENV={sys.prefix}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]
    [found] = [words for words in commands if program in " ".join(words)]
    return found


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository, without what is set up for whoever runs the tests."""
    return subprocess.run(
        words,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# --- The lock -------------------------------------------------------------------------------------


def test_every_line_of_the_lock_names_one_version_by_its_hashes_and_no_place() -> None:
    assert len(locked()) > 200
    for requirement, hashes in locked():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), requirement
    lines = LOCK.read_text("utf-8").splitlines()
    options = [line for line in lines if line.startswith("-") or "://" in line or "@" in line]
    assert options == []


def test_every_direct_dependency_is_locked_in_a_version_that_it_allows() -> None:
    for text in (one for group in project().values() for one in group):
        direct = Requirement(text)
        versions = [one.specifier for one, _ in locked() if one.name == direct.name]
        assert versions, text
        for version in versions:
            assert direct.specifier.contains(str(version).removeprefix("==")), text


@pytest.mark.parametrize("what", ["as locked", "tampered with", "without a hash"])
def test_only_what_was_locked_is_installed(what: str, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "value = 1\n")
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "lock"
    lock.write_text("tiny==1.0" + f" --hash=sha256:{digest}\n" * (what != "without a hash"))
    if what == "tampered with":
        wheel.write_bytes(wheel.read_bytes().replace(b"value = 1", b"value = 2"))

    words = [str(lock) if word == LOCK.name else word for word in recipe("setup", "--requirement")]
    out = tmp_path / "out"
    done = run([*words, "--target", str(out)], PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))

    assert (done.returncode == 0) == (out / "tiny.py").exists() == (what == "as locked"), done.stderr
    told = {"tampered with": "DO NOT MATCH THE HASHES", "without a hash": "Hashes are required"}
    assert told.get(what, "") in done.stderr


def test_the_lock_of_the_image_is_a_part_of_the_lock() -> None:
    """The same versions and hashes as are tested, of what runs and of what builds faletl."""
    whole = {(one.name, str(one.specifier)): hashes for one, hashes in locked()}
    for requirement, hashes in locked(IMAGE_LOCK):
        assert whole[requirement.name, str(requirement.specifier)] == hashes, requirement
    assert 50 < len(locked(IMAGE_LOCK)) < len(locked()) / 2
    names = {one.name for one, _ in locked(IMAGE_LOCK)}
    for group in ("core", "postgres", "s3", "image"):
        assert {Requirement(text).name for text in project()[group]} <= names


def test_no_document_and_no_error_names_a_package_that_no_index_has() -> None:
    """Whoever registers the name first would run code on the machine of each reader."""
    named = re.compile(r"pip install (?:-\S+ )*[\"']?faletl\b")
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".env.example", ROOT / "Dockerfile"]
    texts += [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "faletl").rglob("*.py"),
        *(ROOT / "dags").glob("*.py"),
    ]
    assert [path.name for path in texts if named.search(path.read_text("utf-8"))] == []


def test_the_bill_of_materials_is_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "bill.json"
    words = [str(path) if word.startswith("dist/") else word for word in recipe("sbom", "cyclonedx_py")]
    done = run([*words, "--no-validate"])  # which would take longer than all else
    assert done.returncode == 0, done.stderr
    bill = json.loads(path.read_text("utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {
        (one["name"], one["version"], frozenset(
            f"sha256:{digest['content']}" for digest in one["externalReferences"][0]["hashes"]
        ))
        for one in bill["components"]
    }  # fmt: skip
    assert listed == {
        (one.name, str(one.specifier).removeprefix("=="), hashes) for one, hashes in locked()
    }


DIGEST = "0" * 64
KNOWN = {"info": {}, "vulnerabilities": [], "urls": [{"digests": {"sha256": DIGEST}}]}


@contextmanager
def advisories(certificates: trustme.CA) -> Iterator[str]:
    """A proxy behind which only the package `tiny` is known of, and nothing bad of it; its URL."""

    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_response(200)
            self.end_headers()
            trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificates.issue_cert(self.path.partition(":")[0]).configure_cert(trusted)
            with trusted.wrap_socket(self.connection, server_side=True) as tunnel:
                asked = tunnel.recv(65536).decode().partition("\r\n")[0]
                is_known = "/tiny/" in asked
                body = json.dumps(KNOWN if is_known else {}).encode()
                status = "200 OK" if is_known else "404 Not Found"
                head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
                tunnel.sendall(head.encode() + body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_audit_is_green_only_when_everything_was_looked_up(tmp_path: Path) -> None:
    certificates = trustme.CA()
    certificates.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    lock = tmp_path / "lock"
    words = [str(lock) if word == LOCK.name else word for word in recipe("audit", "pip-audit")]
    words += ["--progress-spinner", "off", "--cache-dir", str(tmp_path / "cache")]

    def audited(names: str, proxy: str) -> tuple[int, str]:
        lock.write_text("".join(f"{name}==1.0 --hash=sha256:{DIGEST}\n" for name in names.split()))
        done = run(words, HTTPS_PROXY=proxy, REQUESTS_CA_BUNDLE=str(tmp_path / "ca.pem"))
        return done.returncode, done.stderr

    with advisories(certificates) as proxy:
        assert audited("tiny", proxy) == (0, "No known vulnerabilities found\n")
        code, told = audited("tiny unknown", proxy)
    assert (code, "not found on PyPI" in told) == (1, True)  # where pip-audit would only skip it
    assert audited("tiny", "http://127.0.0.1:9")[0] == 1  # as on a machine without a network


# --- Why each is there ----------------------------------------------------------------------------


def test_every_direct_dependency_has_its_reason() -> None:
    decisions = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    entry = decisions.partition("## Dependencies")[2].partition("\n## ")[0]
    reasons = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", entry, re.MULTILINE))
    direct = {Requirement(one).name for group in project().values() for one in group}
    assert reasons.keys() == direct
    assert all(reasons.values())


# --- Data is never run ----------------------------------------------------------------------------

RUNS_DATA = {
    "S301": "import pickle\n\npickle.loads(b'')\n",
    "S302": "import marshal\n\nmarshal.loads(b'')\n",
    "S102": "exec('1')\n",
    "S307": "eval('1')\n",
    "S506": "import yaml\n\nyaml.load('a', Loader=yaml.Loader)\n",
    "S501": "import httpx\n\nhttpx.get('https://a.example', verify=False, timeout=1)\n",
    "S602": "import subprocess\n\nsubprocess.run('id', shell=True, check=True)\n",
    "S608": "name = input()\nquery = f'select * from {name}'\n",
}
"""By ruff's rule, what must not be in what we ship."""


@pytest.mark.parametrize("place", ["faletl/new.py", "dags/new.py"])
def test_ruff_catches_what_would_run_data_or_trust_anybody(place: str) -> None:
    for rule, code in RUNS_DATA.items():
        words = [f"{sys.prefix}/bin/ruff", "check", "--output-format", "concise", "--stdin-filename"]
        done = subprocess.run(
            [*words, place, "-"], input=code, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert f" {rule} " in done.stdout, done.stdout


def test_bandit_catches_it_even_where_ruff_was_told_to_look_away(tmp_path: Path) -> None:
    code = "".join(RUNS_DATA[rule].rstrip() + f"  # noqa: {rule}\n" for rule in ("S301", "S307", "S506"))
    (tmp_path / "new.py").write_text(code)
    words = [word for word in recipe("lint", "bandit") if word not in ("faletl", "dags")]
    done = run([*words, "--format", "json", str(tmp_path)])
    assert done.returncode == 1
    found = {one["test_id"] for one in json.loads(done.stdout)["results"]}
    assert found >= {"B301", "B307", "B506"}
