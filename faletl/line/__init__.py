"""The steps over many windows: plan, fetch, replace; and who the key belongs to."""
