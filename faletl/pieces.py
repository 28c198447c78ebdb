"""The former name of `faletl.line.distributed`; it goes with the next release."""

from importlib import import_module
from typing import Any
from warnings import warn

_RENAMED = {
    "Piece": "Chunk",
    "make_plan": "write_plan",
    "pieces": "chunks",
    "extract_piece": "extract_chunk",
    "Planned": "PlannedTask",
    "MOST_PIECES": "MAX_CHUNKS",
    "MOST_BATCHES": "MAX_BATCHES",
}


def __getattr__(name: str) -> Any:
    new_name = _RENAMED.get(name, name)
    value = getattr(import_module("faletl.line.distributed"), new_name)
    new_home = f"faletl.line.distributed.{new_name}"
    warn(f"faletl.pieces.{name} is {new_home} now", DeprecationWarning, stacklevel=2)
    return value
