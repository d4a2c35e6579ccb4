"""What methods are made of, as the listings show it: title, paper, and what each part changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from otmix.models import Architecture

PairingName = Literal["within-batch", "index", "transport", "confusion"]


@dataclass(frozen=True)
class Part:
    """A loss, a mixer, … as the listings show it. `disagrees`: where its paper and its codes disagree, as far as no
    setting says so, and what is done here, one sentence each.
    """

    title: str
    paper: str
    changes: str
    disagrees: tuple[str, ...] = ()


_CB_BETA = "OTmix does not say which beta its rows have; .9999, of the script of Cui et al., here (loss.beta)."

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
        "cross-entropy times 1 - p of the true class (softmax form, gamma 1, as in LDAM's code)",
        (
            "In LDAM's code class weights stand inside p, which makes it p^w; here they multiply the finished loss.",
            "The copies in the codes of CMO, IB and OTmix multiply the loss by 10; here loss.factor is 1.",
        ),
    ),
    "cb-softmax": Part(
        "CB Softmax",
        "Cui et al., CVPR 2019",
        "cross-entropy with effective-number class weights (beta .9999) from the first epoch; with -drw they are "
        "squared later",
        (_CB_BETA,),
    ),
    "cb-sigmoid": Part(
        "CB Sigmoid",
        "Cui et al., CVPR 2019",
        "binary cross-entropies summed over the classes, with the weights of cb-softmax; the head's bias begins at "
        "-log(K-1) and is not decayed",
        (_CB_BETA,),
    ),
    "cb-focal": Part(
        "CB Focal",
        "Cui et al., CVPR 2019",
        "cb-sigmoid with each binary term times 1 - p of its truth (gamma 1; the sigmoid form, unlike focal)",
        (
            _CB_BETA,
            "Its code's 1 - p, in float32, is 0 instead of 1 where the true class's logit is below about -88; here it "
            "is 1.",
        ),
    ),
    "balanced-softmax": Part(
        "BALMS",
        "Ren et al., NeurIPS 2020",
        "cross-entropy of z + log n in training, plain z at test; the loss alone, without the meta sampler",
        (
            "BALMS is the loss and the sampler; what the codes of CMO and OTmix call so is the loss alone, as here.",
            "BALMS's own CIFAR runs have AutoAugment and Cutout; here augmentation is that of every method.",
        ),
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
        "the learning rate steps are its code's with every --schedule but cosine",
        (
            "Read as a re-weighting, IB's influence is a constant to the gradient; in its code, and here, the "
            "gradient flows through it (loss.detach stops it).",
            "The class in IB's code has 10000 for the scale, its training 1000; here loss.scale is 1000.",
            "The p of IB + Focal is in IB's code that of the weighted cross-entropy, p^w; here it is p.",
        ),
    ),
    "lade": Part(
        "LADE",
        "Hong et al., CVPR 2021",
        "cross-entropy of z + log(n/N), and a term that makes z the log-density ratio of a class over the batch; under "
        "mixing each label of an image counts with its share",
        (
            "To weigh images as if classes were equally frequent, LADE's logits would be shifted by the prior of each "
            "image's own label; its code shifts a class's whole column by the prior of that class, and so do we.",
            "LADE's code has one label an image; two calls for a mix would find a class absent from one of them that "
            "the other has. Here one call pools both labels of all images.",
            "LADE's CIFAR runs have BBN's ResNet-32 with 128 features, batches of 256, lr .2, and steps at epochs 120 "
            "and 160 of 200; here network and recipe are those of every method.",
        ),
    ),
}

_DEFERRED = (
    "160 of 240 epochs (by --schedule: 160 of 200 with ldam and bbn, 80 of 200 with imagenet-lt, 160 of 210 with "
    "inaturalist)"
)

REBALANCING_PARTS: dict[str, Part] = {
    "drw": Part(
        "DRW",
        "Cao et al., NeurIPS 2019",
        f"effective-number class weights (Cui et al. 2019, beta .9999) from {_DEFERRED}",
        (
            "OTmix's paper does not say when the weights begin; its code says at epoch 160 of 240 on CIFAR, 80 of 200 "
            "on ImageNet-LT and 160 of 210 on iNaturalist, as here.",
        ),
    ),
    "drs": Part(
        "DRS",
        "Cao et al., NeurIPS 2019",
        f"the background stream draws classes evenly from {_DEFERRED}",
        (
            "In LDAM's code the sampler never takes effect, the loader being built before it; here it does, as in "
            "M2m's.",
        ),
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
        (
            "SaliencyMix's code puts the box of the batch's first pasted image into all; its paper, and here the "
            "default, gives each image its own (box_per).",
            "SaliencyMix's code looks for the peak in normalised float images; here in the pixels themselves.",
        ),
    ),
    "remix": Part(
        "Remix",
        "Chou et al., ECCV-W 2020",
        "Mixup whose label goes wholly to the rarer class where it is much rarer",
        (
            "Remix has no official code. In BagofTricks-LT's the label shares collapse to their average over the "
            "batch; here, as in imbalanced-DL's, each image has its own.",
            "For its metrics imbalanced-DL's passes each batch through the model once more, unmixed, which moves "
            "BatchNorm's statistics; here nothing does.",
        ),
    ),
    "unimix": Part(
        "UniMix",
        "Xu et al., NeurIPS 2021",
        "Mixup whose partners and shares favour rare classes (use with bayias)",
        (
            "UniMix's authors give it with the loss Bayias (bayias+unimix); OTmix's tables have it without.",
            "UniMix's README says that its code's settings are not its paper's. The code's alpha of .8, the default "
            "here, nearly undoes what favours the rarer class of a pair (.2 does not).",
            "A comment in UniMix's code says that batches of 64 double when mixed, but they do not; here --batch-size "
            "decides.",
        ),
    ),
}

PAIRING_PARTS: dict[str, Part] = {
    "cmo": Part(
        "CMO",
        "Park et al., CVPR 2022",
        "pastes rare-class foregrounds into backgrounds taken at random; under the settings of otmix, so that the two "
        "differ in the pairing alone (CMO's own code: alpha 1, box clipped, foreground_r 0)",
        (
            "CMO's paper draws a class with q_k ~ n_k^-r and r = 1; its code gives each image the weight 1/n_k, so all "
            "classes are equally frequent, which is foreground_r 0 here.",
        ),
    ),
    "otmix": Part(
        "OTmix",
        "Gao et al., NeurIPS 2023",
        "pastes rare-class foregrounds into the backgrounds that optimal transport chooses",
        (
            "Each departure of OTmix's released code from its paper is a setting below; a protocol sets them together.",
            "OTmix's ImageNet script begins with weights pretrained on all of ImageNet, CMO's does not; here "
            "--pretrained decides.",
        ),
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
        (
            "In RIDE's code a diversity of 0 trains the mean of the experts; here each expert keeps its own loss.",
            "RIDE's code on CIFAR adds RandomRotation(15), Nesterov momentum and weight decay 5e-4; here augmentation "
            "and recipe are those of every method.",
            "RIDE's model zoo says 100 epochs where its settings file has 200; here --epochs decides.",
            "RIDE's experts have three quarters of the width of the last stages, in ResNet-50 too; here in CIFAR "
            "ResNets alone, so that pretrained weights fit timm's.",
        ),
    ),
    "bbn": Part(
        "BBN",
        "Zhou et al., CVPR 2020",
        "two branches on a shared trunk, one for the natural stream and one for a reversed one, their weights shifting "
        "during the run; takes no mixer",
        (
            "BBN's weights shift by 1 - ((e-1)/E)^2; E is 100 in its code's run of 90 epochs and 200 in that of 180, "
            "where they stop near .2; here E is the number of epochs.",
            "BBN's CIFAR runs have Nesterov momentum, a warm-up of 5 epochs from a third of the learning rate and its "
            "steps of x .01 at epochs 120 and 160 of 200, and leave out an epoch's last, smaller batch; here "
            "--nesterov and --schedule bbn are asked for, and no batch is left out.",
            "The class weights of BBN's code have beta .999999; those of -drw here .9999 (rebalancing.beta).",
        ),
    ),
}

UNMIXED_DEFAULTS: dict[str, tuple[object, str]] = {
    "weighted_mean": ("weighted-mean", "LDAM's and RIDE's code, by F.cross_entropy with weights"),
}

RUNNING_STATISTICS: dict[str, tuple[object, str]] = {
    "bn_statistics": (
        "running",
        "as in all papers and codes; auto is for what was measured to gain from it (results/README.md): CutMix with "
        "foregrounds at random (CMO), and by transport with plain cross-entropy",
    )
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
