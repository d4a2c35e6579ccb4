"""What methods are made of, as the listings show it: title, paper, and what each part changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from otmix.models import Architecture

PairingName = Literal["within-batch", "index", "transport", "confusion"]


@dataclass(frozen=True)
class Part:
    """A loss, a mixer, … as the listings show it."""

    title: str
    paper: str
    changes: str


LOSS_PARTS: dict[str, Part] = {
    "ce": Part("ERM", "empirical risk minimisation with cross-entropy", "nothing: the plain baseline"),
    "ldam": Part(
        "LDAM",
        "Cao et al., NeurIPS 2019",
        "a margin of .5 (n/n_min)^(-1/4) on the true class, and a normed head with scale 30 (LDAM's code has the scale "
        "in the loss: the same numbers)",
    ),
    "focal": Part(
        "Focal",
        "Lin et al., ICCV 2017",
        "cross-entropy times 1 - p of the true class (softmax form, gamma 1, as in LDAM's code); the released "
        "code of OTmix multiplies by 10, we do not",
    ),
    "cb-softmax": Part(
        "CB Softmax",
        "Cui et al., CVPR 2019",
        "cross-entropy with effective-number class weights (beta .9999) from the first epoch; with -drw they are "
        "squared later",
    ),
    "cb-sigmoid": Part(
        "CB Sigmoid",
        "Cui et al., CVPR 2019",
        "binary cross-entropies summed over the classes, with the weights of cb-softmax; the head's bias begins at "
        "-log(K-1) and is not decayed",
    ),
    "cb-focal": Part(
        "CB Focal",
        "Cui et al., CVPR 2019",
        "cb-sigmoid with each binary term times 1 - p of its truth (gamma 1; the sigmoid form, unlike focal)",
    ),
    "balanced-softmax": Part(
        "BALMS",
        "Ren et al., NeurIPS 2020",
        "cross-entropy of z + log n in training, plain z at test; the loss alone, without the meta sampler, as in the "
        "released codes of CMO and OTmix",
    ),
    "logit-adjustment": Part(
        "Logit Adjustment",
        "Menon et al., ICLR 2021",
        "cross-entropy of z + tau log(n/N) in training, plain z at test; with tau 1, the default, balanced softmax; "
        "or, with loss.post_hoc, plain training and z - tau log(n/N) at test",
    ),
    "bayias": Part(
        "Bayias",
        "Xu et al., NeurIPS 2021 (with UniMix)",
        "cross-entropy of z + log(prior of training / prior of test), the test's uniform: balanced softmax but for a "
        "constant",
    ),
    "ib": Part(
        "IB",
        "Park et al., ICCV 2021",
        "from half of the run on each image's loss is divided by its influence, |p - onehot| |h|, and weighted by 1/n; "
        "with --schedule steps or ldam the learning rate steps are its code's; the gradient flows through the weight, "
        "as in its code (loss.detach stops it)",
    ),
    "lade": Part(
        "LADE",
        "Hong et al., CVPR 2021",
        "cross-entropy of z + log(n/N), and a term that makes z the log-density ratio of a class over the batch; under "
        "mixing each label of an image counts with its share",
    ),
}

REBALANCING_PARTS: dict[str, Part] = {
    "drw": Part(
        "DRW",
        "Cao et al., NeurIPS 2019",
        "effective-number class weights (Cui et al. 2019, beta .9999) from 160/240 of the epochs (from 160/200 with "
        "--schedule ldam)",
    ),
    "drs": Part(
        "DRS",
        "Cao et al., NeurIPS 2019",
        "the background stream draws classes evenly from 160/240 of the epochs (160/200 with --schedule ldam); in "
        "LDAM's own code the sampler never takes effect",
    ),
    "cbs": Part("CBS", "Kang et al., ICLR 2020", "class-balanced sampling: the background stream draws classes evenly"),
    "srs": Part("SRS", "Mahajan et al., ECCV 2018", "square-root sampling: backgrounds' classes are drawn ~ n^(1/2)"),
}

# where these differ from the defaults of the class that does it (both deferred ones begin when the schedule says)
REBALANCING_DEFAULTS: dict[str | None, dict[str, float]] = {"drs": {"start": 160 / 240}, "srs": {"power": 0.5}}

PIXEL_PARTS: dict[str, Part] = {
    "cutmix": Part("CutMix", "Yun et al., ICCV 2019", "pastes a rectangle of one image into another of the batch"),
    "mixup": Part("Mixup", "Zhang et al., ICLR 2018", "blends each image with another of the batch"),
    "saliencymix": Part(
        "SaliencyMix",
        "Uddin et al., ICLR 2021",
        "CutMix whose rectangle is centred on the most salient pixel of the pasted image",
    ),
    "remix": Part(
        "Remix", "Chou et al., ECCV-W 2020", "Mixup whose label goes wholly to the rarer class where it is much rarer"
    ),
    "unimix": Part(
        "UniMix", "Xu et al., NeurIPS 2021", "Mixup whose partners and shares favour rare classes (use with bayias)"
    ),
}

PAIRING_PARTS: dict[str, Part] = {
    "cmo": Part(
        "CMO",
        "Park et al., CVPR 2022",
        "pastes rare-class foregrounds into backgrounds taken at random; under the settings of otmix, so that the two "
        "differ in the pairing alone (CMO's own code: alpha 1, box clipped, foreground_r 0)",
    ),
    "otmix": Part(
        "OTmix",
        "Gao et al., NeurIPS 2023",
        "pastes rare-class foregrounds into the backgrounds that optimal transport chooses",
    ),
    "confusion": Part(
        "Confusion",
        "Gao et al., NeurIPS 2023, Table 4",
        "pastes rare-class foregrounds into a background of the class that they are most often confused with; "
        "set.confusion_run takes F from a finished run, as the paper does",
    ),
}
PAIRINGS: dict[str, PairingName] = {"cmo": "index", "otmix": "transport", "confusion": "confusion"}

ARCHITECTURE_PARTS: dict[Architecture, Part] = {
    "ride": Part(
        "RIDE",
        "Wang et al., ICLR 2021",
        "several experts on a shared trunk, each with the loss named, pushed apart by a KL term (first stage, without "
        "the router and distillation)",
    ),
    "bbn": Part(
        "BBN",
        "Zhou et al., CVPR 2020",
        "two branches on a shared trunk, one for the natural stream and one for a reversed one, their weights shifting "
        "during the run; takes no mixer",
    ),
}

UNMIXED_DEFAULTS: dict[str, tuple[object, str]] = {
    "weighted_mean": ("weighted-mean", "LDAM's and RIDE's code, by F.cross_entropy with weights"),
}

# What a pixel rule's own paper or code does differently from the protocols (which speak of OTmix and CMO), as
# (value, source): it holds where the rule mixes a batch with itself.
_WHOLE_RUN = {"mix_from": (0.0, "no margin in its code"), "mix_until": (1.0, "no margin in its code")}
PIXEL_DEFAULTS: dict[str, dict[str, tuple[object, str]]] = {
    "cutmix": {
        **_WHOLE_RUN,
        "mix_probability": (0.5, "CutMix's code on CIFAR (1 on ImageNet)"),
        "alpha": (1.0, "CutMix's code"),
        "box": ("clipped", "CutMix's code"),
    },
    "mixup": {
        **_WHOLE_RUN,
        "mix_probability": (1.0, "Mixup's code"),
        "alpha": (1.0, "Mixup's code on CIFAR (.2 on ImageNet in MiSLAS)"),
    },
    "saliencymix": {
        **_WHOLE_RUN,
        "mix_probability": (0.5, "SaliencyMix's code"),
        "alpha": (1.0, "SaliencyMix's code"),
        "box_per": ("image", "SaliencyMix's paper; its code takes one image's box for the whole batch"),
    },
    "remix": {
        **_WHOLE_RUN,
        "mix_probability": (1.0, "as Mixup; Remix has no official code"),
        "alpha": (1.0, "imbalanced-DL's re-implementation"),
        "weighted_mean": ("mean", "as in UniMix's code and the re-implementations of Remix"),
    },
    "unimix": {
        **_WHOLE_RUN,
        "mix_probability": (1.0, "UniMix's code: every batch"),
        "alpha": (0.8, "UniMix's code (which nearly cancels the method; .2 does not)"),
        "weighted_mean": ("mean", "UniMix's code"),
    },
}
# the same where foregrounds come from the second stream
SECOND_STREAM_DEFAULTS: dict[str, dict[str, tuple[object, str]]] = {
    "saliencymix": {"box_per": ("image", "the peak is each foreground's own; the paper is silent")},
    "unimix": {"alpha": PIXEL_DEFAULTS["unimix"]["alpha"]},
}
CONFUSION_DEFAULTS: dict[str, tuple[object, str]] = {
    "confusion_from": ("held-out", "nothing is embedded during training that F could be streamed from"),
}

ALIASES: dict[str, str] = {
    "erm": "ce",
    "drw": "ce-drw",
    "erm-drw": "ce-drw",
    "balms": "balanced-softmax",
    "balms-drw": "balanced-softmax-drw",
    "ride": "ride-ldam-drw",
    "bbn": "bbn-ce",
    **{mixer: f"ce+{mixer}" for mixer in (*PAIRINGS, *PIXEL_PARTS)},
}
