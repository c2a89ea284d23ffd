"""`python -m fxopt` is `fxopt`."""

from fxopt.cli import main

if __name__ == "__main__":
    main()
