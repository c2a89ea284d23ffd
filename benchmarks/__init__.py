"""Measurements of fxopt itself. See README.md in this directory."""
