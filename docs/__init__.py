"""Documents that `make docs` generates from the code, in addition to those written by hand."""
