"""Benchmarks: `python -m tests.benchmarks [names]`; one module a benchmark, each with `run()`."""
