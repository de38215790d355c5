"""`python -m agln_fast.cli`, for environments whose scripts are not on the path."""

from agln_fast.cli.app import main

if __name__ == "__main__":
    main()
