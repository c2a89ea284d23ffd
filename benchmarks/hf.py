"""The Hugging Face suite: `python -m benchmarks.hf`. As `fxopt bench hf`, with a file of results."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("hf")
