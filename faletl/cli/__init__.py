"""The command line: commands, what they print, and the demo."""

from faletl.cli.commands import main

__all__ = ["main"]
