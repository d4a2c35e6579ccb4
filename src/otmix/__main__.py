"""The command `otmix`, and `python -m otmix`."""

import os
import sys

from otmix.interrupts import interruptible


def main() -> int:
    """The command line from its first moment on: its own modules take a tenth of a second, in which Ctrl-C may come."""
    if sys.platform == "win32":  # else Intel's Fortran, in Anaconda's SciPy, ends us at Ctrl-C before anything is saved
        os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")
    try:
        with interruptible():
            from otmix import cli

            return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("\notmix: stopped\n")
        return 130


if __name__ == "__main__":  # processes that training starts import this file again
    sys.exit(main())
