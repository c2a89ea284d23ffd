"""The suites of `fxopt bench`: each makes jobs of a plan, and says what its table shows."""
