"""Documents that are made of the code, beside those written by hand; `make docs` makes them anew."""
