from faletl.config import Settings as Settings
from faletl.errors import FaletlError as FaletlError
from faletl.line.report import Report as Report
from faletl.operations.rebuild import rebuild as rebuild
from faletl.operations.verify import verify as verify
from faletl.pipeline import build as build
from faletl.pipeline import dry_run as dry_run
from faletl.pipeline import extract as extract
from faletl.pipeline import load as load
from faletl.pipeline import publish as publish
from faletl.pipeline import run as run
from faletl.selection import Asked as Asked

__version__: str
__all__: list[str]
