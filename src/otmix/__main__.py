"""`python -m otmix` is `otmix`."""

import sys

from otmix.cli import main

if __name__ == "__main__":  # processes that training starts import this file again
    sys.exit(main())
