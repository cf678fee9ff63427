"""Experiments: grids of runs, each of which ``python -m dflows.fit`` could do alone."""
