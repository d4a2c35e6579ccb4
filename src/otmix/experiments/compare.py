"""Several methods on the same images, several seeds each: train what is missing, then say what the numbers allow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from otmix import training
from otmix.config import RunConfig, default_run_dir
from otmix.data import SMALL, ImageDataset
from otmix.errors import UserError
from otmix.experiments.jobs import train_in_processes
from otmix.experiments.progress import ProcessProgress
from otmix.experiments.summary import Comparison, Outcome, summarise
from otmix.extensions import UNKNOWN, hash_of_definition, import_files
from otmix.files import make_folder_of
from otmix.losses import BUILT_IN as BUILT_IN_LOSSES
from otmix.losses import LOSSES
from otmix.methods import Method, check_settings, parse_method
from otmix.mixing import BUILT_IN as BUILT_IN_MIXERS
from otmix.mixing import PIXEL_RULES
from otmix.training.launch import cores
from otmix.training.records import (
    changed_data,
    changed_inputs,
    read_config,
    read_data,
    read_result,
    read_settings,
    runs_folder,
)
from otmix.training.reporter import Reporter, Silent
from otmix.training.setup import filled_in, load_data
from otmix.wording import counted

MOST_SEEDS = 1000
JOBS_A_CORE = 4
"""More would only take memory; on a CPU more than one does."""


class ComparisonInterrupted(training.Interrupted):
    """A comparison was asked to stop; the runs that were being trained have saved."""

    def __init__(self, folder: Path, finished: int, total: int) -> None:
        super().__init__(folder)
        self.finished, self.total = finished, total

    def __str__(self) -> str:
        return (
            f"stopped with {self.finished} of {self.total} runs finished; the same command goes on from there "
            f"(the runs are in {self.run_dir})"
        )

    def __reduce__(self) -> tuple[type[ComparisonInterrupted], tuple[Path, int, int]]:  # type: ignore[override]  # more arguments
        return (type(self), (self.run_dir, self.finished, self.total))


def compare(
    base: RunConfig,
    methods: Sequence[str],
    *,
    seeds: int = 3,
    jobs: int = 1,
    runs: str | Path | None = None,
    reporter: Reporter | None = None,
    imports: Sequence[str | Path] = (),
) -> Comparison:
    """Compare `methods` under `base`'s settings, with the seeds base.seed, base.seed + 1, …

    Runs that are finished are reused, the others are trained or continued, baselines first. `jobs` of them run at once,
    each in its own process (`jobs` = 1: here, one after the other). `imports` are Python files with losses and mixers
    of your own, loaded here and in each process. A run that fails leaves the others alone. The runs and what is found
    are in `runs` (default: $OTMIX_RUNS or ./runs). Raises UserError for a mistake in what is asked, and
    `ComparisonInterrupted` after Ctrl-C.
    """
    reporter = reporter or Silent()
    import_files([Path(file) for file in imports])
    chosen = _checked(base, methods, seeds, jobs)
    folder = runs_folder() if runs is None else Path(runs)
    configs = {
        (method.name, seed): _config(base, method, seed, folder)
        for method in sorted(chosen, key=_training_order)
        for seed in range(base.seed, base.seed + seeds)
    }
    finished = {key: config for key, config in configs.items() if training.is_finished(_run_dir(config))}
    # what the others hold is known by their names
    dataset = load_data(base, reporter.loading) if finished and base.data == "folder" else None
    outcomes = {key: _reused(*key, config, dataset) for key, config in finished.items()}
    missing = {key: config for key, config in configs.items() if key not in outcomes}
    if jobs > 1 and len(missing) > 1:
        _check_processes_know([part for method, _ in missing for part in _own_parts(method)], imports)
    reused = dict(part for method, _ in outcomes for part in _own_parts(method))
    if unknown := [words for words, part in reused.items() if hash_of_definition(part) == UNKNOWN]:
        reporter.message(
            f"the source of {' and '.join(unknown)} cannot be read here, so finished runs are reused whether or not it "
            "has changed; define it in a file"
        )
    reporter.message(_plan_in_words(chosen, seeds, len(outcomes), len(missing)))
    make_folder_of(folder / "comparison", "--runs")
    try:
        _train_missing(missing, outcomes, jobs, [str(file) for file in imports], reporter)
    except (KeyboardInterrupt, training.Interrupted):
        done = sum(training.is_finished(_run_dir(config)) for config in configs.values())
        raise ComparisonInterrupted(folder, done, len(configs)) from None
    return summarise(base, chosen, [outcomes[key] for key in sorted(outcomes, key=_place_in(chosen))], folder)


def _checked(base: RunConfig, methods: Sequence[str], seeds: int, jobs: int) -> list[Method]:
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, it is {value}")
    if seeds > MOST_SEEDS:
        raise UserError(f"--seeds {seeds} are more than anybody can train; give at most {MOST_SEEDS}")
    if jobs > JOBS_A_CORE * cores():
        raise UserError(
            f"--jobs {jobs} is too many for {counted(cores(), 'core')}; give at most {JOBS_A_CORE * cores()}"
        )
    if base.out is not None:
        raise UserError(
            "a comparison makes a folder for each run; name the one that they are all put into with --runs, not --out"
        )
    chosen = list(dict.fromkeys(parse_method(name) for name in methods))
    if not chosen:
        raise UserError(
            "name at least one method to compare, e.g. `otmix compare erm cmo otmix`; `otmix methods` lists them all"
        )
    check_settings(base.set, base.protocol, methods)
    return chosen


def _own_parts(method: str) -> list[tuple[str, type]]:
    """The loss and the mixer of a method that are not the library's: in words, and the class."""
    parsed = parse_method(method)
    parts: list[tuple[str, type]] = []
    if parsed.loss not in BUILT_IN_LOSSES:
        parts.append((f"the loss {parsed.loss!r}", LOSSES[parsed.loss]))
    if parsed.pixels is not None and parsed.pixels not in BUILT_IN_MIXERS:
        parts.append((f"the mixer {parsed.pixels!r}", PIXEL_RULES[parsed.pixels]))
    return parts


def _check_processes_know(parts: Iterable[tuple[str, type]], imports: Sequence[str | Path]) -> None:
    """Raises UserError for one's own that is known here alone: registered in a script or a notebook."""
    files = {str(Path(file).resolve()) for file in imports}
    for words, part in parts:
        here_alone = part.__module__ == "__main__" and getattr(sys.modules["__main__"], "__file__", None) not in files
        if not files or here_alone:
            raise UserError(
                f"{words} is known to this process alone, and jobs > 1 trains in others, which need a file that "
                "registers it and does nothing else: give imports=[FILE], or jobs=1"
            )


def _training_order(method: Method) -> tuple[bool, bool]:
    """Baselines first: without a mixer, without re-weighting."""
    return method.mixer is not None, method.rebalancing is not None


def _place_in(chosen: Sequence[Method]) -> Callable[[tuple[str, int]], tuple[int, int]]:
    names = [method.name for method in chosen]
    return lambda key: (names.index(key[0]), key[1])


def _config(base: RunConfig, method: Method, seed: int, folder: Path) -> RunConfig:
    config = replace(base, method=method.name, seed=seed, out=None, resume=True, set=method.only_own(base.set))
    return replace(config, out=str(default_run_dir(config, folder)))


def _run_dir(config: RunConfig) -> Path:
    return training.run_dir_of(config)


def _reused(method: str, seed: int, config: RunConfig, dataset: ImageDataset | None) -> Outcome:
    """A finished run. Raises UserError where its folder holds another one: what is shown must be what was asked for."""
    run_dir = _run_dir(config)
    known = read_config(run_dir)
    size = config.image_size or known.image_size
    # what was left open must be what it is today: defaults have changed before
    filled = config if size is None else filled_in(config, size, size <= SMALL, sum(read_data(run_dir)["counts"]))
    asked = filled.identity_with(parse_method(method).effective(config.protocol, config.set))
    done = known.identity_with(read_settings(run_dir))
    other = [
        f"{key}: {done.get(key)} there, {value} asked for"
        for key, value in asked.items()
        if key != "root" and value is not None and value != done.get(key)
    ]
    if other:
        raise UserError(
            f"{run_dir} holds a run with other settings ({'; '.join(other)}); "
            "move it away, or name another folder with --runs"
        )
    if dataset is not None and (changed := changed_data(run_dir, dataset)):
        raise UserError(
            f"the data in {config.root} are not those that {run_dir} was trained on ({', '.join(changed)} changed); "
            "move it away, or name another folder with --runs"
        )
    if files := changed_inputs(run_dir, config):
        raise UserError(
            f"{files} no longer holds what {run_dir} was trained with; move that run away, or name another folder "
            "with --runs"
        )
    return Outcome(method, seed, run_dir, "reused", read_result(run_dir))


def _train_missing(
    missing: dict[tuple[str, int], RunConfig],
    outcomes: dict[tuple[str, int], Outcome],
    jobs: int,
    imports: Sequence[str],
    reporter: Reporter,
) -> None:
    """Train one after the other, or `jobs` at once, and note what becomes of each."""
    total, began = len(missing), time.monotonic()
    ended = 0

    def note(config: RunConfig, error: str | None) -> None:
        nonlocal ended
        ended += 1
        key, run_dir = (config.method, config.seed), _run_dir(config)
        if error is None and training.is_finished(run_dir):
            outcomes[key] = Outcome(*key, run_dir, "trained", read_result(run_dir))
        else:
            outcomes[key] = Outcome(*key, run_dir, "failed", error=error or f"{run_dir} has no result.json")
        reporter.message(f"[{ended}/{total}, {_duration(time.monotonic() - began)}] {_in_words(outcomes[key])}")

    if jobs == 1 or total <= 1:
        for config in missing.values():
            note(config, _train_here(config, reporter))
        return
    if next(iter(missing.values())).data.startswith("cifar"):
        load_data(next(iter(missing.values())), reporter.loading)  # so that one process downloads the archive, not all
    display: AbstractContextManager[Any] = nullcontext()
    if not isinstance(reporter, Silent) and sys.stderr.isatty():
        display = ProcessProgress(list(missing.values()))
    with display as progress:
        train_in_processes(
            list(missing.values()), jobs, note, imports=imports, tick=None if progress is None else progress.update
        )


def _train_here(config: RunConfig, reporter: Reporter) -> str | None:
    """Train in this process; the sentence that stopped it, or None."""
    try:
        training.train(config, reporter)
    except training.Interrupted:
        raise
    except UserError as error:
        return str(error)
    except Exception as error:  # a device out of memory, a mistake in one's own loss: not of the other runs
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _plan_in_words(chosen: Sequence[Method], seeds: int, finished: int, missing: int) -> str:
    names = ", ".join(method.title for method in chosen)
    state = (
        "all finished already, reused" if not missing else f"{finished} finished already, reused; {missing} to train"
    )
    return f"{names}: {counted(seeds, 'seed')} each, {counted(finished + missing, 'run')} ({state})"


def _in_words(outcome: Outcome) -> str:
    title = f"{parse_method(outcome.method).title}, seed {outcome.seed}"
    if outcome.status == "failed":
        return f"{title} failed: {outcome.error}"
    return f"{title}: top-1 error {100 * outcome.result['evaluation']['top1_error']:.1f} % on {outcome.result['split']}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
