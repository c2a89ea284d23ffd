"""Triton kernels as templates: plain Triton to be read, and the text that codegen specialises.

A template's file has the formula first and `@triton.jit` functions below a marker; all below is copied into
the files of kernels. Device functions that a template calls and does not define (`is_live`, `scored`) are
those of one case; `example_functions` has them for a causal mask, so that a template can be read and run.
"""
