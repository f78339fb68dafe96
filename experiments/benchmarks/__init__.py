"""Benchmark scripts: ``python -m experiments.benchmarks.NAME``."""
