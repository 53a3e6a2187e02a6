"""Benchmarks, one module each with a `run()`: `python -m benchmarks [names]`."""
