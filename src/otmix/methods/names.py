"""Every trainable method as a value, and the grammar of their names: `[architecture-]loss[-rebalancing][+mixer]`.

`ce+otmix` is canonical in files and keys; `otmix` is one of its aliases. The titles are how the paper's tables print
them. A mixer is a pixel rule, within the batch (`mixup`), or after `cmo-`, `otmix-` and `confusion-` with foregrounds
of the second stream (`otmix-mixup`); `cmo`, `otmix` and `confusion` alone mean CutMix. Titles are names too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING

from otmix.errors import UserError
from otmix.methods.method import Method, loss_part, mixer_part
from otmix.methods.parts import ALIASES, ARCHITECTURE_PARTS, PAIRINGS, REBALANCING_PARTS, Part
from otmix.protocols import PROTOCOLS, Protocol, ProtocolName

if TYPE_CHECKING:
    from otmix.models import Architecture


def known_losses() -> list[str]:
    """Names of all losses, those registered from outside included."""
    from otmix.losses import LOSSES

    return list(LOSSES)


def known_mixers() -> list[str]:
    """Names of all mixers: each pixel rule within the batch, and with each rule for the second stream."""
    from otmix.mixing import PIXEL_RULES

    second = [pairing + ("" if pixels == "cutmix" else f"-{pixels}") for pairing in PAIRINGS for pixels in PIXEL_RULES]
    return [*PIXEL_RULES, *second]


def _canonical_mixer(mixer: str) -> str:
    """`otmix` for `otmix-cutmix`."""
    mixer = _named(mixer, known_mixers(), mixer_part)
    return mixer.removesuffix("-cutmix") if mixer.partition("-")[0] in PAIRINGS else mixer


def _spelt(title: str) -> str:
    """A title as the grammar has it: `erm-drw+otmix-mixup` for "ERM-DRW + OTmix (Mixup)"."""
    plain = re.sub(r"\s*\(([^()]*)\)", r"-\1", title.strip().lower())
    return re.sub(r"\s+", "-", re.sub(r"\s*([+-])\s*", r"\1", plain))


def _of_tables(text: str) -> str:
    """What the paper's tables call rows that have shorter names here: "RIDE (3 experts)", "ResNet-32 (baseline)", and
    "+ OTmix (Cutmix)" below that.
    """
    left, plus, mixer = text.partition("+")
    if plus and not left and _canonical_mixer(mixer) in known_mixers():
        return mixer
    if found := re.fullmatch(r"ride-(\d+)-experts?", left):
        if found[1] != "3":
            raise UserError(
                f"the number of experts is a setting: give ride{plus}{mixer} and --set.model.experts {found[1]}"
            )
        left = "ride"
    return f"{'ce' if left == 'resnet-32-baseline' else left}{plus}{mixer}"


def experts_of(title: str) -> tuple[str, int] | None:
    """ "ride+otmix" and 4 for the paper's "RIDE (4 experts) + OTmix"; None for what is no such title."""
    left, plus, mixer = _spelt(title).partition("+")
    found = re.fullmatch(r"ride-(\d+)-experts?", left)
    return (f"ride{plus}{mixer}", int(found[1])) if found else None


def _named(text: str, names: Iterable[str], part: Callable[[str], Part]) -> str:
    """The one of `names` that is `text`, or whose title it is; `text` where none or several are."""
    titled = [] if text in names else [name for name in names if _spelt(part(name).title) == text]
    return titled[0] if len(titled) == 1 else text


def parse_method(name: str) -> Method:
    """`[architecture-]loss[-rebalancing][+mixer]`, or an alias, e.g. `erm`, `cmo`, `drw+otmix`, `ride` (the loss is
    `ce` where none is given: `ride-drw` is `ride-ce-drw`), or a title such as `BALMS + OTmix`.

    Raises UserError with the nearest names, and for what does not go together.
    """
    text = _of_tables(_spelt(name))
    if _canonical_mixer(text) in known_mixers():
        text = f"ce+{text}"
    left, plus, mixer = ALIASES.get(text, text).partition("+")
    left = ALIASES.get(left, left)
    if "+" in left:  # an alias that carries a mixer, followed by another one
        raise _unknown(name)
    architecture: Architecture = "plain"
    for known in ARCHITECTURE_PARTS:
        if left.startswith(f"{known}-"):
            architecture, left = known, left.removeprefix(f"{known}-")
            left = ALIASES.get(left, left)
            break
    loss, _, last = left.rpartition("-")
    rebalancing = last if loss and last in REBALANCING_PARTS and left not in known_losses() else None
    loss = ALIASES.get(loss, loss) if rebalancing else left
    loss = _named(loss, known_losses(), loss_part)
    mixer = _canonical_mixer(mixer)
    if loss not in known_losses() or (plus and mixer not in known_mixers()):
        raise _unknown(name)
    if architecture == "bbn" and mixer:
        raise UserError(
            f"{name} does not exist: BBN takes no mixer, since its two branches already use up both streams; "
            f"use {loss}+{mixer} or ride-{loss}+{mixer} instead"
        )
    return Method(loss, rebalancing, mixer or None, architecture)


def all_methods() -> list[Method]:
    """Every combination of the grammar, baselines first."""
    return list(_all(tuple(known_losses()), tuple(known_mixers())))


@cache
def _all(losses: tuple[str, ...], mixers: tuple[str, ...]) -> tuple[Method, ...]:
    architectures: tuple[Architecture, ...] = ("plain", *ARCHITECTURE_PARTS)
    return tuple(
        Method(loss, rebalancing, mixer, architecture)
        for architecture in architectures
        for loss in losses
        for rebalancing in (None, *REBALANCING_PARTS)
        for mixer in (None, *(mixers if architecture != "bbn" else ()))
    )


def _unknown(name: str) -> UserError:
    names = [*ALIASES, *(method.name for method in all_methods())]
    close = difflib.get_close_matches(name.lower(), names, n=3)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "a name is [ride-|bbn-]loss[-drw|-drs|-cbs|-srs][+mixer]."
    )
    return UserError(
        f"there is no method named {name!r}; {hint} `otmix methods` lists them all; for one of your own add "
        "--import FILE, the file that defines it"
    )


def protocol_differences(name: ProtocolName) -> dict[str, tuple[object, object]]:
    """Settings in which a protocol differs from `clean`: name -> (clean's value, its value)."""
    clean, other = PROTOCOLS["clean"], PROTOCOLS[name]
    return {
        f.name: (getattr(clean, f.name), getattr(other, f.name))
        for f in fields(Protocol)
        if getattr(clean, f.name) != getattr(other, f.name)
    }
