"""The commands of the `fxopt` program, one module each. `fxopt.cli` parses, these do."""
