"""Every row of the paper's tables as a value, and the grammar of their names."""

from otmix.methods.checking import check_read, check_settings
from otmix.methods.method import Method, base_name, experts, loss_part, mixer_part
from otmix.methods.names import all_methods, experts_of, known_losses, known_mixers, parse_method, protocol_differences
from otmix.methods.parts import (
    ALIASES,
    ARCHITECTURE_PARTS,
    LOSS_PARTS,
    PAIRING_PARTS,
    PAIRINGS,
    PIXEL_PARTS,
    REBALANCING_PARTS,
    PairingName,
    Part,
)

__all__ = [
    "ALIASES",
    "ARCHITECTURE_PARTS",
    "LOSS_PARTS",
    "PAIRINGS",
    "PAIRING_PARTS",
    "PIXEL_PARTS",
    "REBALANCING_PARTS",
    "Method",
    "PairingName",
    "Part",
    "all_methods",
    "base_name",
    "check_read",
    "check_settings",
    "experts",
    "experts_of",
    "known_losses",
    "known_mixers",
    "loss_part",
    "mixer_part",
    "parse_method",
    "protocol_differences",
]
