"""`python -m docs`: write the documents that are generated from the code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from docs import dictionary, examples, star_schema, suites

DOCUMENTS: Mapping[str, Callable[[], str]] = {
    "data-dictionary.md": dictionary.document,
    "star-schema.svg": star_schema.picture,
    "queries.md": examples.queries,
    "bi.md": examples.bi,
    "validation.md": lambda: examples.outputs(suites.document()),
    "../README.md": examples.readme,
}
"""Documents, relative to this folder, that are generated or filled with real output."""

if __name__ == "__main__":
    for name, make in DOCUMENTS.items():
        (Path(__file__).parent / name).write_text(make(), "utf-8")
