"""The command line: `python -m lib_memnoise`."""

from lib_memnoise.lab.cli import main

if __name__ == "__main__":
    main()
