"""`python -m dynamics.cli`, the same as the console script `dynamics`."""

from dynamics.cli import main

if __name__ == "__main__":
    main()
