"""What makes this repository's own tables: plans, runs, references, reports; not in the wheel.

An experiment is a grid of runs, each of which ``python -m dflows.fit`` could do alone.
"""
