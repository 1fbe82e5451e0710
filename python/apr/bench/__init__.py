"""Benchmarks that run from an installed wheel: `python -m apr bench`."""
