"""Talking to fal: a request, a whole answer or a typed error, the walk over pages."""
