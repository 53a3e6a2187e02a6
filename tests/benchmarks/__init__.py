"""Benchmarks, one module each with a `run()`: `python -m tests.benchmarks [names]`."""
