"""`python -m docs.release TAG NOTES DIST`: check what a tag would publish, and write its notes."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import InvalidMetadata, Metadata

from faletl import __version__

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def notes(tag: str, version: str, changelog: str) -> str:
    """Return the section of the changelog for that version, without its heading.

    Raises:
        ValueError: the tag is not `v` and the version, or the changelog has no dated section of that
            version, or an empty one.
    """
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag!r}, but faletl/__init__.py has {version}: tag v{version}")
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$"
    section = re.search(heading + r"\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md needs a heading '## {version} - YYYY-MM-DD' with text below")
    return section[1].strip() + "\n"


def require_publishable(folder: Path, version: str) -> None:
    """Check that the folder has exactly a source archive and a wheel of that version.

    Raises:
        ValueError: it has not, or an index would refuse the metadata of one of them.
    """
    names = sorted(path.name for path in folder.iterdir())
    expected = [f"faletl-{version}-py3-none-any.whl", f"faletl-{version}.tar.gz"]
    if names != expected:
        raise ValueError(f"{folder} has {names}, not {expected}")
    wheel, archive = (folder / name for name in names)
    with zipfile.ZipFile(wheel) as packed:
        described = {wheel.name: packed.read(f"faletl-{version}.dist-info/METADATA")}
    with tarfile.open(archive) as packed_source:
        member = packed_source.extractfile(f"faletl-{version}/PKG-INFO")
        described[archive.name] = member.read() if member else b""
    for name, text in described.items():
        try:
            metadata = Metadata.from_email(text, validate=True)
        except ExceptionGroup as group:
            reasons = "; ".join(str(e) for e in group.exceptions if isinstance(e, InvalidMetadata))
            raise ValueError(f"an index would refuse the metadata of {name}: {reasons}") from None
        if (metadata.name, str(metadata.version)) != ("faletl", version):
            raise ValueError(f"the metadata of {name} are of {metadata.name} {metadata.version}")


if __name__ == "__main__":
    try:
        text = notes(sys.argv[1], __version__, CHANGELOG.read_text("utf-8"))
        require_publishable(Path(sys.argv[3]), __version__)
    except ValueError as error:
        sys.exit(str(error))
    Path(sys.argv[2]).write_text(text, "utf-8")
