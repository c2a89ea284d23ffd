"""Attention alone: `python -m benchmarks.attention`. As `fxopt bench attention`, with a file of results."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("attention")
