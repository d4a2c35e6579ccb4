"""Training: one run from a configuration to a complete directory."""

from otmix.training.loop import Interrupted
from otmix.training.reporter import Progress, Reporter, RunInfo, Silent
from otmix.training.run import train
from otmix.training.runs import Run, is_finished, open_run, run_dir_of

__all__ = [
    "Interrupted",
    "Progress",
    "Reporter",
    "Run",
    "RunInfo",
    "Silent",
    "is_finished",
    "open_run",
    "run_dir_of",
    "train",
]
