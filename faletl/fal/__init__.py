"""HTTP with fal: a request gives a complete answer or a typed error; a walk gives all pages."""
