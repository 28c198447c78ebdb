"""`python -m faletl`: the command line."""

from faletl.cli import main

main()
