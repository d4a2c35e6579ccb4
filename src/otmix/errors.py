"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for or in the data: one sentence saying what, where and how to mend it. The command
    line exits with 2.
    """
