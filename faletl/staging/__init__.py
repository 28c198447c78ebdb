"""Staging: landed pages become the typed, proven rows of one window."""
