"""The time of compilation: `python -m benchmarks.compile_time`. As `fxopt bench compile`, with a file."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("compile")
