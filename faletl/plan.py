"""The former home of `faletl.Asked`; this name of the module goes with the next release."""

from importlib import import_module
from typing import Any
from warnings import warn


def __getattr__(name: str) -> Any:
    value = getattr(import_module("faletl.selection"), name)
    warn(f"faletl.plan.{name} is faletl.{name} now", DeprecationWarning, stacklevel=2)
    return value
