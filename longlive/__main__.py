"""`python -m longlive`: the `longlive` command where the package is not installed."""

from .cli.app import main

main()
