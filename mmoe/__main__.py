"""`python -m mmoe` is the command `mmoe`."""

import sys

from mmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
