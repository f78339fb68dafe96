"""Experiments and benchmarks; not part of the package."""
