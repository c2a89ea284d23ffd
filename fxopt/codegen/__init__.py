"""Code generation: regions of a graph become Triton kernels, each a file that can be read and run."""
