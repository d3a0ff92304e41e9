"""Benchmarks of the operator and its attention kernel: verified first, then timed. A new one is a file and an entry."""
