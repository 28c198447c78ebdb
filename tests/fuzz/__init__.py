"""Fuzzing: mutated pages, headers and files against all that reads what others wrote.

    python -m tests.fuzz --executions 5000000 --seed 1

Corpus are the recorded answers of fixtures/ and those of the sandbox. A mutation changes tokens of
JSON (values, names, brackets) or bytes, with what is known to be odd. Whatever comes out, a reader
takes it and tells the truth about it, or refuses it with an error of its own: each target says what
that means. A run depends on its seed alone.
"""
