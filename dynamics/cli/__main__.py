"""`python -m dynamics.cli`, the same as the console script `dynamics`."""

from dynamics.cli import main

main()
