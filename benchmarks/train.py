"""The suite train: `python -m benchmarks.train`. As `fxopt bench train`, with a file of results."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("train")
