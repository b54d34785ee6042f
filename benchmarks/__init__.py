"""Benchmarks: each measures variants side by side, interleaved, in one run, and prints ratios."""
