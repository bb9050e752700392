"""Run the command as `python -m fairway`."""

import sys

from fairway.cli import main

if __name__ == "__main__":
    sys.exit(main())
