"""Measurements that print and save their numbers: `python -m benchmarks.<name>`."""
