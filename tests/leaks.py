"""Finds a key wherever it may have been left: in parts, in other clothes, in any kind of file."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import duckdb
import zstandard

FRAGMENT = 10
"""So many characters in a row give something away, and stand in no other text by chance."""


def leaks(key: str, content: bytes) -> set[str]:
    """The forms in which something of the key stands in there, be it broken over lines."""
    content += b"\n" + b"".join(content.split())
    return {f"{form}: {fragment.decode()}" for form, fragment in _fragments(key) if fragment in content}


def _fragments(key: str) -> Iterator[tuple[str, bytes]]:
    for form, text in _forms(key):
        for start in range(0, max(1, len(text) - FRAGMENT + 1), FRAGMENT):
            yield form, text[start : start + FRAGMENT]


def _forms(key: str) -> Iterator[tuple[str, bytes]]:
    key_id, _, secret = key.partition(":")
    for half, text in (("id", key_id), ("secret", secret)):
        yield half, text.encode()
        yield f"{half} in hex", text.encode().hex().encode()
        yield f"{half} in hex", text.encode().hex().upper().encode()
        yield f"{half} percent-encoded", quote(text, safe="").encode()
    header = f"Key {key}".encode()
    for lead in range(3):
        for coded in (base64.b64encode, base64.urlsafe_b64encode):
            # The first groups hold "Key " and what stands before, the last what stands behind.
            yield "base64", coded(b"\0" * lead + header)[8:-4]


def everything_in(folder: Path) -> bytes:
    """Names and contents of all files below; of pages, tables and Parquet also what is compressed."""
    parts = []
    for path in sorted(folder.rglob("*")):
        parts.append(str(path).encode())
        if path.is_file():
            content = path.read_bytes()
            parts.append(content)
            if path.suffix == ".zst":
                parts.append(zstandard.ZstdDecompressor().decompress(content))
            elif content[8:12] == b"DUCK":
                parts += _rows_of_all_tables(path)
            elif content[:4] == content[-4:] == b"PAR1":
                parts.append(repr(duckdb.sql(f"from '{path}'").fetchall()).encode())
    return b"\n".join(parts)


def _rows_of_all_tables(path: Path) -> Iterator[bytes]:
    """Of a copy, with the .wal that may stand beside it: looking changes nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        for one in path.parent.glob(f"{path.name}*"):
            if one.suffix in (path.suffix, ".wal"):
                shutil.copyfile(one, Path(scratch) / one.name)
        (Path(scratch) / path.name).chmod(0o600)
        with duckdb.connect(str(Path(scratch) / path.name)) as connection:
            tables = connection.execute("select schema_name, table_name from duckdb_tables()").fetchall()
            for schema, table in tables:
                yield repr(connection.execute(f'from "{schema}"."{table}"').fetchall()).encode()
