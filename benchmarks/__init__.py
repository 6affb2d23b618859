"""Gradient accumulation beside its peers: `python -m benchmarks` writes RESULTS.md and plots."""
