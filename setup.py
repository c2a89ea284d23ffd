"""Computes the list of packages; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=sorted(
        {
            "fxopt",
            "fxopt.passes",
            *find_packages(include=["fxopt.*"]),
            *(f"fxopt.passes.{name}" for name in find_packages("passes")),
        }
    )
)
