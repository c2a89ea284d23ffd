"""Linear layers with quantized weights: `python -m benchmarks.quant`. As `fxopt bench quant`, with a file."""

from benchmarks.suite import main

if __name__ == "__main__":
    main("quant")
