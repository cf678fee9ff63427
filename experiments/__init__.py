"""The experiments behind this repository's tables: plans, runs, references and reports.

An experiment is a grid of runs, each of which ``python -m dflows.fit`` could do alone. The package
is not in the wheel.
"""
