"""The rewrites, shipped as the package ``fxopt.passes``: one rewrite, one file."""

if __name__ != "fxopt.passes":
    raise ImportError(
        f"this package is fxopt.passes, it was imported as {__name__!r}: "
        "install fxopt (pip install -e .) and import fxopt.passes"
    )
