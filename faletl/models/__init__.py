"""Run sql/ layer by layer, then its checks."""
