"""Know what you spend on fal.ai: extract, prove, load and model the data of fal's Platform APIs.

    from faletl import Settings, run

    report = run(Settings.load())

The names below are the public Python API; each is loaded when it is first used. The architecture is in
docs/architecture.md.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Asked": "faletl.selection",
    "FaletlError": "faletl.errors",
    "Report": "faletl.line.report",
    "Settings": "faletl.config",
    "build": "faletl.pipeline",
    "dry_run": "faletl.pipeline",
    "extract": "faletl.pipeline",
    "load": "faletl.pipeline",
    "publish": "faletl.pipeline",
    "rebuild": "faletl.operations.rebuild",
    "run": "faletl.pipeline",
    "verify": "faletl.operations.verify",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'faletl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
