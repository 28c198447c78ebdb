"""Know what you spend on fal.ai: extract, prove, load and model what fal's Platform APIs tell.

The steps are a Python API of their own: see `faletl.pipeline`. Architecture: docs/architecture.md.
"""

__version__ = "0.1.0"
