"""`python -m dynamics`, the same as the console script `dynamics`."""

from dynamics.cli import main

main()
