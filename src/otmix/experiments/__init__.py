"""Many runs, and what they say together: `compare` trains methods side by side, `units` keeps the facts of single runs.

Nothing here draws or prints: tables and pages of a comparison are made by `otmix.reports` from its rows and notes.
"""

from otmix.experiments.compare import ComparisonInterrupted, compare
from otmix.experiments.differences import PairedDifference, paired_difference
from otmix.experiments.summary import Comparison, Outcome

__all__ = ["Comparison", "ComparisonInterrupted", "Outcome", "PairedDifference", "compare", "paired_difference"]
