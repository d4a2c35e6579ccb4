"""What a trained model is worth: over all images, per class, per shot group, and how far to trust its confidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otmix.models.embedding import Autocast, Probabilities, looking, softmax
from otmix.types import SHOT_GROUPS, Batch, ClassCounts, Items, ShotGroup


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results on `n` labelled images of K classes. Rates are fractions in [0, 1]; None: there was nothing to measure.

    - `top1_error`: share of images whose most probable class is not theirs.
    - `per_class_accuracy [K]`: share of each class's images that are right; None for a class without images.
    - `balanced_accuracy`: mean of `per_class_accuracy` over the classes that have images.
    - `group_error`: error over all images of the many-, medium- and few-shot classes (by training size); None for a
      group without images. On a balanced test set this is also the mean over the group's classes.
    - `calibration_error`: expected calibration error (Guo et al. 2017, eq. 3) of the top-1 confidence, Σ_b |b|/n ·
      |acc_b − conf_b| over bins of equal width, each open on the left and closed on the right.
    - `negative_log_likelihood`: mean of −ln p(true class), in nats; probabilities below float32's least normal number
      count as that.
    - `confusion [K,K]` int64: images of true class (row) by predicted class (column).
    """

    n: int
    top1_error: float
    balanced_accuracy: float
    per_class_accuracy: tuple[float | None, ...]
    group_error: dict[ShotGroup, float | None]
    calibration_error: float
    negative_log_likelihood: float
    confusion: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.per_class_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the confusion as triples [true, predicted, images] of the cells that are not zero."""
        cells = torch.nonzero(self.confusion)
        triples = torch.cat([cells, self.confusion[cells[:, 0], cells[:, 1]][:, None]], dim=1)
        return {
            "n": self.n,
            "top1_error": self.top1_error,
            "balanced_accuracy": self.balanced_accuracy,
            "per_class_accuracy": list(self.per_class_accuracy),
            "group_error": dict(self.group_error),
            "calibration_error": self.calibration_error,
            "negative_log_likelihood": self.negative_log_likelihood,
            "confusion": triples.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """The inverse of `to_dict`."""
        num_classes = len(values["per_class_accuracy"])
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        triples = torch.tensor(values["confusion"], dtype=torch.int64).reshape(-1, 3)
        confusion[triples[:, 0], triples[:, 1]] = triples[:, 2]
        return cls(
            n=values["n"],
            top1_error=values["top1_error"],
            balanced_accuracy=values["balanced_accuracy"],
            per_class_accuracy=tuple(values["per_class_accuracy"]),
            group_error={name: values["group_error"][name] for name in SHOT_GROUPS},
            calibration_error=values["calibration_error"],
            negative_log_likelihood=values["negative_log_likelihood"],
            confusion=confusion,
        )


def evaluate_predictions(
    probabilities: Tensor,
    labels: Tensor,
    counts: ClassCounts | None,
    *,
    many: int = 100,
    few: int = 20,
    bins: int = 15,
) -> Evaluation:
    """`Evaluation` of class probabilities `[n,K]` against `labels [n]`, tensors, arrays or lists.

    `counts` are the training sizes that make the shot groups (`ClassCounts.shot_groups(many, few)`); without them every
    group is None.
    Raises ValueError for shapes that do not fit, no images, labels out of range, or probabilities outside [0, 1].
    """
    probabilities = torch.as_tensor(probabilities).detach().cpu().double()  # in this order: MPS has no float64
    given = torch.as_tensor(labels).detach()
    labels = given.to("cpu", torch.int64)
    _check(probabilities, labels, counts)
    if given.is_floating_point():
        raise ValueError(f"labels must be class numbers, integers, not {given.dtype}")
    n, num_classes = probabilities.shape
    confidence, predicted = probabilities.max(dim=1)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.view(num_classes, num_classes)
    images, right = confusion.sum(dim=1), confusion.diagonal()
    per_class = tuple(r / m if m else None for r, m in zip(right.tolist(), images.tolist(), strict=True))
    measured = [accuracy for accuracy in per_class if accuracy is not None]
    likelihood = probabilities.gather(1, labels[:, None]).clamp_min(torch.finfo(torch.float32).tiny)
    return Evaluation(
        n=n,
        top1_error=1 - int(right.sum()) / n,
        balanced_accuracy=sum(measured) / len(measured),
        per_class_accuracy=per_class,
        group_error=_group_error(images, right, counts, many, few),
        calibration_error=expected_calibration_error(confidence, predicted == labels, bins),
        negative_log_likelihood=float(-likelihood.log().mean()),
        confusion=confusion,
    )


def top1_error(probabilities: Tensor, labels: Tensor) -> float:
    """The `top1_error` of `evaluate_predictions` alone: with thousands of classes all else takes most of the time, and
    memory for K × K counts.

    Raises ValueError as that does.
    """
    probabilities, labels = probabilities.detach().cpu(), labels.detach().cpu()
    _check(probabilities, labels, None)
    predicted = torch.from_numpy(probabilities.numpy().argmax(1))  # a quarter of torch's time
    return 1 - int((predicted == labels).sum()) / len(labels)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Σ_b |b|/n · |acc_b − conf_b|, as a fraction, for `confidence [n]` in [0, 1] and `correct [n]` bool.

    Bin b holds the confidences in ((b−1)/bins, b/bins], the first also 0.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.bucketize(confidence.double(), edges[1:-1])
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct.double() - confidence.double())
    return float(gaps.abs().sum() / confidence.numel())


def predict_probabilities(
    model: Callable[[Tensor], object],
    batches: Iterable[Batch],
    *,
    probabilities: Probabilities = softmax,
    autocast: Autocast = nullcontext,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the model says of all `batches`: (probabilities `[n,K]` float32, labels `[n]`, index `[n]` or None), on the
    CPU.

    The batches are on the model's device. The model is in eval mode meanwhile and afterwards as before.
    Raises ValueError when there is no batch.
    """
    parts, items = [], []
    with looking(model, autocast) as look:
        for batch in batches:
            parts.append(probabilities(look(batch.images)).float().cpu())
            items.append(batch.items.to("cpu"))
    if not parts:
        raise ValueError("there are no images to predict")
    together = Items.concatenate(items)
    return torch.cat(parts), together.labels, together.index


def _group_error(
    images: Tensor, right: Tensor, counts: ClassCounts | None, many: int, few: int
) -> dict[ShotGroup, float | None]:
    errors: dict[ShotGroup, float | None] = dict.fromkeys(SHOT_GROUPS)
    for name, classes in counts.shot_groups(many, few).items() if counts is not None else ():
        if classes is not None and (total := int(images[classes].sum())):
            errors[name] = 1 - int(right[classes].sum()) / total
    return errors


def _check(probabilities: Tensor, labels: Tensor, counts: ClassCounts | None) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities must be [n,K] and labels [n], not {tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    n, num_classes = probabilities.shape
    if n == 0:
        raise ValueError("there are no images to evaluate")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"label {low if low < 0 else high} is out of range; labels must be 0 … {num_classes - 1}")
    # Softmax in float32 may exceed 1 by a rounding error. The negation also catches NaN.
    least, most = map(float, probabilities.aminmax())
    if not (least >= 0 and most <= 1 + 1e-5):
        raise ValueError("probabilities must be within [0, 1] and not NaN; pass class probabilities, not logits")
    if counts is not None and counts.num_classes != num_classes:
        raise ValueError(f"the training set has {counts.num_classes} classes, the probabilities {num_classes}")
