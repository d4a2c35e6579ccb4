"""What both solvers share: the numbers of the method."""

from __future__ import annotations

import math

BLOCK = 6
"""Iterations between two looks at the error, each followed by an extrapolation."""
HISTORY = 4
"""How many differences of steps an extrapolation combines."""
LONGEST_LEAP = 16.0
"""An extrapolation changes the logarithm of no scaling by more than this."""
PATIENCE = 6
"""After as many blocks without a new least error a block may not be worse than the one before, else it is undone: leaps
can go round in circles for ever, plain iterations cannot. For the same reason a leap that brings no new least error is
followed by a block without one, the next such by 3, then 7, and so on.
"""


def far(tiny: float) -> float:
    """While no logarithm of a scaling is beyond this, what underflowed in the kernel is nothing in the coupling."""
    return -math.log(tiny) / 4
