"""`python -m attnvariants`."""

from attnvariants.cli import main

if __name__ == "__main__":
    main()
