"""What the commands and the benchmarks measure with: models of any size, timing, errors, the machine."""
