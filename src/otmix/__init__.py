"""otmix: image classifiers for long-tailed data. The public names are loaded when they are first used."""

__version__ = "0.1.0.dev0"
