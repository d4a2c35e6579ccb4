"""`otmix preview`: what would be pasted into what, before hours of training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from otmix.cli.arguments import GROUPS, Only
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.extensions import import_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure
    from torch import Tensor

    from otmix.data import ImageDataset, ImageStore
    from otmix.training.setup import Plan
    from otmix.types import Batch, Confusion, Embed, Items

PREVIEWED = Only((*GROUPS["data"], "method", "protocol", "set", *GROUPS["model"], "batch_size", "seed"))
COLUMNS = 12
CONFUSION_IMAGES = 1000
"""Training images that F is estimated from, for a picture of what a finished run would do."""


def preview(
    config: Annotated[RunConfig, PREVIEWED],
    *,
    run: Path | None = None,
    out: Path = Path("preview.png"),
    imports: list[Path],
) -> int:
    """Draw foregrounds pasted into random backgrounds, and into those transport chooses.

    Transport compares images by the features of a model: that of --run, or else the backbone, pretrained where weights
    can be had. Without a run there is no confusion between classes yet, so the cost is that of the first epoch.

    Args:
        run: a finished run, whose data, settings and model are used.
        out: the picture, a PNG.
        imports: Python file to load first, with the run's own loss or mixer; may be given several times.

    Examples:
        otmix preview --data folder --root photos
        otmix preview --run runs/a --out mixes.png
    """
    import_files(imports)
    from otmix.display import reporter_on_stderr, stdout_console
    from otmix.reports.figures import save
    from otmix.training.runs import refuse_file_of_a_run
    from otmix.training.setup import load_data

    if out.suffix.lower() not in ("", ".png"):
        raise UserError(f"the picture is a PNG, which --out {out} does not say; name a file that ends in .png")
    root = None if config.root is None else Path(config.root).resolve()
    if root is not None and root in out.resolve().parents and out.exists():
        raise UserError(f"--out {out} is one of the pictures in {config.root}; name another file")
    refuse_file_of_a_run(out)
    with reporter_on_stderr() as reporter:
        dataset = load_data(config, reporter.loading)
    model = from_run(config, run, dataset) if run else untrained_or_pretrained(config, dataset)
    save(draw(model), out)
    console = stdout_console()
    console.print(f"features of {model.features}\nwrote {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


@dataclass(frozen=True, eq=False)
class Previewed:
    """What to draw with: data, model and settings in `plan`, and in words where the features come from."""

    plan: Plan
    features: str
    trained: bool


def draw(previewed: Previewed) -> Figure:
    """One batch of each stream, paired twice and pasted with the same boxes; the first twelve foregrounds."""
    from otmix.data import WorkerStore
    from otmix.mixing import CutMix
    from otmix.pairing import Curriculum, IndexPairing, PairingContext
    from otmix.randomness import Moment
    from otmix.reports.figures import preview_grid
    from otmix.sampling import BackgroundStream, ForegroundStream

    plan = previewed.plan
    stage, dataset = plan.stages[0], plan.dataset
    assert stage.mixer is not None
    assert stage.foreground_probability is not None
    assert isinstance(stage.mixer.pairing, Curriculum)
    moment = Moment(seed=plan.config.seed)
    # only the images of one step are read, however large the dataset is
    store = WorkerStore(dataset.train, dataset.image_size, "cpu", workers=0)
    background = store.fetch(BackgroundStream(dataset.train.labels, stage.background_batch).epoch(moment)[0], None)
    stream = ForegroundStream(dataset.train.labels, stage.foreground_probability)
    foreground = store.fetch(stream.step(len(background), moment), None)
    images = {id(batch.items): batch for batch in (background, foreground)}
    look = _embed(plan, lambda items: images[id(items)])
    context = PairingContext(moment, _confusion(plan, store) if previewed.trained else None)

    shown = slice(0, COLUMNS)
    rows, mixer = {}, stage.mixer.mixer
    height, width = background.images.shape[-2:]
    for name, pairing in (("random", IndexPairing()), ("transport", stage.mixer.pairing.then)):
        pairs = pairing(foreground.items, background.items, look, context)
        above, below = foreground[pairs.foreground][shown], background[pairs.background][shown]
        drawn = mixer.draw(len(above), height, width, moment.generator("mix"))  # the same for both
        mixed = mixer.apply(below, above, drawn)
        rows[name] = (below, mixed)
    boxes = drawn.expand(len(above), 4) if isinstance(mixer, CutMix) else None
    return preview_grid(
        foreground=above.images,
        foreground_labels=above.items.labels,
        random_background=rows["random"][0].images,
        random_labels=rows["random"][0].items.labels,
        random_mixed=rows["random"][1].images,
        transport_background=rows["transport"][0].images,
        transport_labels=rows["transport"][0].items.labels,
        transport_mixed=rows["transport"][1].images,
        shares=rows["transport"][1].image_share,
        class_names=dataset.class_names,
        title=f"{dataset.name}: random backgrounds, and transport's by the features of {previewed.features}",
        boxes=boxes,
    )


def from_run(config: RunConfig, run_dir: Path, dataset: ImageDataset) -> Previewed:
    """With the model of a finished run. Raises UserError where it does not fit the data."""
    from otmix.training import open_run
    from otmix.training.setup import prepare

    run = open_run(run_dir)
    seen = (run.class_names, run.image_size, run.channels)
    if seen != (tuple(dataset.class_names), dataset.image_size, dataset.channels):
        raise UserError(
            f"{run_dir} was trained on other classes or another image size than {dataset.name} has here; use its own"
        )
    # the weights come from the run, so none are fetched
    config = replace(config, pretrained=False, weights=None, backbone=run.config.backbone)
    plan = prepare(_with_transport(config), dataset)
    return Previewed(replace(plan, model=run.model), f"the run {run_dir.name}", trained=True)


def untrained_or_pretrained(config: RunConfig, dataset: ImageDataset) -> Previewed:
    """With the backbone as training would begin; untrained where its weights cannot be had and were not asked for."""
    from otmix.training.setup import prepare

    config = _with_transport(config)
    try:
        plan = prepare(config, dataset)
    except UserError as error:
        if config.pretrained is not None or config.weights is not None:
            raise
        try:
            plan = prepare(replace(config, pretrained=False), dataset)
        except UserError:
            raise error from None
        return Previewed(
            plan, f"{plan.config.backbone}, untrained because its pretrained weights cannot be had", trained=False
        )
    pretrained = plan.config.pretrained or plan.config.weights
    return Previewed(plan, f"{plan.config.backbone}, {'pretrained' if pretrained else 'untrained'}", trained=False)


def _with_transport(config: RunConfig) -> RunConfig:
    """The same loss and pixel rule with transport, for a run of another method; BBN's loss without its branches."""
    from otmix.methods import check_settings, parse_method

    method = parse_method(config.method)
    mixer = "otmix" if method.pixels in (None, "cutmix") else f"otmix-{method.pixels}"
    architecture = "plain" if method.architecture == "bbn" else method.architecture
    method = replace(method, mixer=mixer, architecture=architecture)
    check_settings(config.set, config.protocol, [config.method, method.name])
    return replace(config, method=method.name, set=method.only_own(config.set))


def _embed(plan: Plan, fetch: Callable[[Items], Batch]) -> Embed:
    """As training looks at images under the plan's protocol, but always in eval mode."""
    from otmix.models import make_embed
    from otmix.types import Output

    def official(pixels: Tensor) -> Output:
        return Output(plan.model(pixels).logits, plan.model.official_features(pixels))

    model = official if plan.protocol.features == "official" else plan.model
    return make_embed(model, fetch, probabilities=plan.stages[0].criterion.probabilities)


def _confusion(plan: Plan, store: ImageStore) -> Confusion | None:
    """How the model confuses some of its training images: close to what the last epoch of its run knew."""
    from otmix.confusion import ConfusionCounter
    from otmix.randomness import Moment
    from otmix.sampling import BackgroundStream
    from otmix.types import ConfusionOrigin

    labels = plan.dataset.train.labels
    counter = ConfusionCounter(len(plan.dataset.class_names), ConfusionOrigin(soft=plan.protocol.confusion_soft))
    look = _embed(plan, lambda items: store.fetch(items, None))
    batch = 128
    for items in BackgroundStream(labels, batch).epoch(Moment(seed=plan.config.seed, epoch=1))[
        : CONFUSION_IMAGES // batch
    ]:
        seen = look(items)
        assert seen.log_probabilities is not None
        counter.add(items.labels, seen.log_probabilities)
    return counter.estimate()
