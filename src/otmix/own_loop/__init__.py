"""OTmix in anyone's training loop."""

from otmix.own_loop.otmixer import OTMixer

__all__ = ["OTMixer"]
