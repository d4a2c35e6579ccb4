"""The commands that train and use models.

Each is a typed function that returns the exit code; what is heavy is imported when it runs.
"""

from __future__ import annotations

import io
import json as json_module
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TextIO

from otmix.cli.arguments import GROUPS, Only
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.extensions import import_files
from otmix.methods import check_settings, parse_method
from otmix.streams import takes_all_letters, tell
from otmix.wording import command_line, counted

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
COMPARED = Only(tuple(name for names in GROUPS.values() for name in names if name not in ("method", "out", "resume")))


def train(config: RunConfig, *, imports: list[Path]) -> int:
    """Train one model, evaluate it, and keep everything about it in a run directory.

    Ctrl-C saves and says how to go on; `otmix train --resume --out RUN` goes on with any run.

    Args:
        imports: Python file to load first, with losses and mixers of your own (`@register_loss`, `@register_mixer`);
            may be given several times.

    Examples:
        otmix train                                             OTmix on the digits, in about a minute
        otmix train --data folder --root photos --out runs/a    your own images, a folder for each class
        otmix train --data cifar10 --method ce-drw+otmix --precision bf16-mixed
        otmix train --resume --out runs/a                       go on
    """
    import_files(imports)
    check_settings(config.set, config.protocol, [config.method])
    from otmix.display import make_reporter
    from otmix.training import Interrupted, run_dir_of
    from otmix.training import train as train_run
    from otmix.training.runs import has_begun

    # the folder's name is made of what the texts stand for, as training makes it
    config = replace(config, set=parse_method(config.method).converted(config.set))
    if config.resume and not has_begun(run_dir_of(config)):
        if config.out and not (run_dir_of(config) / "config.yaml").exists() and config.identity == RunConfig().identity:
            raise UserError(
                f"there is no run in {config.out} to go on with, and nothing is said of what to train; name the folder "
                "of a run that has begun with --out, or leave out --resume to train on the digits"
            )
        tell(f"otmix: {run_dir_of(config)} holds no run to go on with, so one begins there\n")
    try:
        train_run(config, make_reporter())
    except (Interrupted, KeyboardInterrupt) as stop:
        run_dir = stop.run_dir if isinstance(stop, Interrupted) else run_dir_of(config)
        if not (run_dir / "checkpoint.pt").is_file():
            raise KeyboardInterrupt from None
        again = ["otmix", "train", "--resume", "--out", str(run_dir)]
        again += [word for file in imports for word in ("--import", str(file))]
        saved = "the run is saved" if isinstance(stop, Interrupted) else "its last checkpoint is kept"
        tell(f"\notmix: stopped, {saved}; this goes on with it:\n  {command_line(again)}\n")
        return 130
    return 0


def compare(
    methods: list[str],
    /,
    config: Annotated[RunConfig, COMPARED],
    *,
    seeds: int = 3,
    jobs: int = 1,
    runs: Path | None = None,
    imports: list[Path],
) -> int:
    """Train several methods with several seeds, and compare them in a table and a page.

    Runs that are finished already are reused, others are gone on with, so the same command can be stopped and
    repeated. The seeds are --seed and those that follow it.

    Args:
        methods: names as in `otmix methods`; `methods` in the file of --config where none is given.
        seeds: runs of each method.
        jobs: runs at once, each in a process of its own, on one device.
        runs: folder that all runs are put into (default: $OTMIX_RUNS or ./runs).
        imports: Python file to load first, with losses and mixers of your own (`@register_loss`, `@register_mixer`);
            may be given several times.

    Examples:
        otmix compare erm cmo otmix --seeds 3
        otmix compare erm otmix --data folder --root photos --seeds 5 --jobs 2
    """
    import_files(imports)
    check_settings(config.set, config.protocol, methods)
    from otmix.display import make_reporter, print_table, stdout_console
    from otmix.experiments import compare as compare_methods
    from otmix.reports.page import write_comparison_page
    from otmix.reports.tables import compare_table
    from otmix.training import Interrupted

    files = [str(file) for file in imports]
    try:
        found = compare_methods(
            config, methods, seeds=seeds, jobs=jobs, runs=runs, reporter=make_reporter(brief=True), imports=files
        )
    except Interrupted as stop:
        tell(f"\notmix: {stop}\n")
        return 130
    console = stdout_console()
    if found.rows:
        print_table(console, compare_table(found.rows))
    for note in found.notes:
        console.print(note, markup=False, highlight=False)
    if found.rows:
        trained = [outcome.run_dir for outcome in found.outcomes if outcome.status != "failed"]
        typed = command_line(["otmix", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else None
        page = write_comparison_page(
            found.path.with_suffix(".html"), found.rows, found.notes, runs=trained, command=typed
        )
        console.print(f"table   {found.table}\npage    {page}", markup=False, highlight=False, soft_wrap=True)
    return 1 if found.failed else 0


def evaluate(
    run: Path,
    /,
    *,
    split: Literal["test", "validation"] = "test",
    json: bool = False,
    accelerator: Accelerator = "auto",
    root: str | None = None,
    imports: list[Path],
) -> int:
    """Evaluate a finished run again on its own data.

    Args:
        run: the run's directory.
        split: the images to look at.
        json: everything that was measured, per class too, as JSON; numbers of classes are in the order of
            `class_names`.
        accelerator: where to compute.
        root: where the data is now, if it has moved.
        imports: Python file to load first, with the run's own loss or mixer; may be given several times.

    Examples:
        otmix evaluate runs/a
        otmix evaluate runs/a --split validation --json
    """
    import_files(imports)
    from otmix.display import print_table, reporter_on_stderr, stdout_console
    from otmix.inference import evaluate_run
    from otmix.reports.tables import result_table
    from otmix.training.records import read_data, read_result

    with reporter_on_stderr() as reporter:
        found = evaluate_run(run, split, accelerator, root, reporter)
    if json:
        named = {"class_names": read_data(run)["class_names"]}
        sys.stdout.write(json_module.dumps(found | named, ensure_ascii=not takes_all_letters(sys.stdout)) + "\n")
    else:
        print_table(stdout_console(), result_table({**read_result(run), "split": split, "evaluation": found}))
    return 0


def predict(
    run: Path,
    paths: list[Path],
    /,
    *,
    format: Literal["csv", "jsonl"] | None = None,
    top: int = 5,
    out: Path | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int = 64,
    accelerator: Accelerator = "auto",
    imports: list[Path],
) -> int:
    """Classify images with a finished run.

    Args:
        run: the run's directory.
        paths: images, or folders of images at any depth.
        format: one line for each image, as csv or as jsonl (default: as the ending of `out` says, else csv).
        top: how many of the most probable classes to list.
        out: file to write (default: the terminal).
        on_bad_image: stop at a broken image, or skip it and list it on stderr.
        batch_size: images at a time.
        accelerator: where to compute.
        imports: Python file to load first, with the run's own loss or mixer; may be given several times.

    Examples:
        otmix predict runs/a photo.jpg
        otmix predict runs/a photos/new --out predictions.jsonl
    """
    import_files(imports)
    from otmix.data import IMAGE_ENDINGS
    from otmix.display import reporter_on_stderr
    from otmix.files import write_atomic
    from otmix.inference import predict_paths, write_csv, write_jsonl
    from otmix.training.runs import refuse_file_of_a_run

    if out is not None and out.suffix.lower() in IMAGE_ENDINGS:
        raise UserError(f"--out {out} is the name of a picture, and predictions are text; name a .csv or .jsonl file")
    if out is not None:
        refuse_file_of_a_run(out)
    if format is None:
        format = "jsonl" if out is not None and out.suffix.lower() in (".jsonl", ".ndjson") else "csv"
    written = 0
    with reporter_on_stderr() as reporter:
        # on a terminal the lines themselves show how far it is
        progress = None if out is None and sys.stdout.isatty() else reporter.looking
        predictions = predict_paths(
            run,
            paths,
            top=top,
            on_bad_image=on_bad_image,
            batch_size=batch_size,
            device=accelerator,
            progress=progress,
        )

        def write(stream: TextIO) -> None:
            nonlocal written
            written = write_csv(predictions, stream, top) if format == "csv" else write_jsonl(predictions, stream)

        def write_bytes(stream: BinaryIO) -> None:
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            write(text)
            text.detach()  # flushes, and leaves the file open for who opened it

        if out is None:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # a ? would be another file's name
            write(sys.stdout)
        else:
            write_atomic(out, write_bytes)
            reporter.close()
            reporter.message(f"{counted(written, 'image')} classified in {out}")
    return 0
