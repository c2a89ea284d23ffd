"""Helpers shared by the tests: numerics, the model zoo, compile statistics."""
