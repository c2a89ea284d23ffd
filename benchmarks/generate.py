"""The suite generate: `python -m benchmarks.generate`. As `fxopt bench generate`, with a file of results."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("generate")
