"""Benchmarks of fastnewton: `python -m bench --help`."""
