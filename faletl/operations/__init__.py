"""One command each that is not a step of the line: check, verify, rebuild, maintain and others."""
