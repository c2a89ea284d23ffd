"""Regions beside the roofline: `python -m benchmarks.kernels`. As `fxopt bench fusion`, with a file.

`python -m benchmarks.fusion` counts what whole models launch and move, and runs nothing.
"""

from benchmarks.suite import main

if __name__ == "__main__":
    main("fusion")
