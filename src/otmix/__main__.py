"""The command `otmix`, and `python -m otmix`."""

import sys

from otmix.interrupts import interruptible


def main() -> int:
    """The command line from its first moment on: its own modules take a tenth of a second, in which Ctrl-C may come."""
    try:
        with interruptible():
            from otmix import cli

            return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("\notmix: stopped\n")
        return 130


if __name__ == "__main__":  # processes that training starts import this file again
    sys.exit(main())
