"""Looking at images with the present model without leaving a trace in it: for costs, confusion and evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

from otmix.errors import UserError
from otmix.types import Batch, Embed, Embedded, Items, Output

Autocast = Callable[[], AbstractContextManager[Any]]
Probabilities = Callable[[Output], Tensor]


def softmax(output: Output) -> Tensor:
    """Class probabilities `[B,K]` of a model whose logits mean log-probabilities up to a constant."""
    return output.logits.softmax(dim=1)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and Fabric's wrapper.

    Their forwards would talk to other processes, which may not be looking at the same time. A compiled network stays
    compiled: its graph for eval mode without gradient is made once, beside the one for training.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        return unwrap(model.module)
    if type(model).__name__ == "_FabricModule":  # by name: this layer does not import lightning
        return unwrap(cast(nn.Module, model.module))
    compiled = model._modules.get("_orig_mod")
    if compiled is None:
        return model
    inner = unwrap(compiled)
    return model if inner is compiled else inner


def networks_of(model: Callable[..., object]) -> list[nn.Module]:
    """The modules whose mode a call of `model` depends on: itself, or what a function names, closes over, is bound to.

    Functions of the same file are followed, and so are attributes of objects and the entries of lists and dictionaries,
    one level deep.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    home: str | None = None
    todo: list[object] = [model]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.append(thing)
        elif isinstance(thing, partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            todo += [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing):
            function = inspect.unwrap(thing)
            home = home or function.__module__
            if inspect.isfunction(function) and function.__module__ == home:
                names = inspect.getclosurevars(function)
                defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
                todo += [*names.nonlocals.values(), *names.globals.values(), *defaults]
        elif isinstance(thing, (list, tuple, dict)):
            values = thing.values() if isinstance(thing, dict) else thing
            todo += [value for value in values if isinstance(value, nn.Module)]
        elif not isinstance(thing, (type, ModuleType)):
            todo += [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, nn.Module)]
            todo.append(inspect.getattr_static(type(thing), "__call__", None))
    return found


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """All modules in eval mode; afterwards each in its own mode again, so a BatchNorm frozen in eval mode stays so."""
    changed = _training_modules(networks)
    try:
        _set_training(changed, False)
        yield
    finally:
        _set_training(changed, True)


@contextmanager
def eval_mode_when_called() -> Iterator[None]:
    """Every module that is called goes into eval mode first; afterwards each is in its own mode again.

    For a function that reaches its network in a way that cannot be seen beforehand; each call of a module, anywhere in
    the process, costs a little more meanwhile.
    """
    changed: list[nn.Module] = []

    def to_eval(module: nn.Module, _: object) -> None:
        if module.training:
            changed.append(module)
            _set_training([module], False)

    hook = register_module_forward_pre_hook(to_eval)
    try:
        yield
    finally:
        hook.remove()
        _set_training(changed, True)


@contextmanager
def looking(
    model: Callable[[Tensor], object], autocast: Autocast = nullcontext
) -> Iterator[Callable[[Tensor], Output]]:
    """Gives `images -> Output` (float32) of `model`, in eval mode, without gradient and without a trace in the model.

    `model` is a module or a function that returns an `Output` or a pair (features, logits). `autocast()` is entered
    around each call.
    """
    forward = unwrap(model) if isinstance(model, nn.Module) else model

    def look(images: Tensor) -> Output:
        with autocast():
            output = as_output(forward(images))
        return Output(output.logits.float(), _float(output.features), _float(output.expert_logits))

    networks = networks_of(model)
    # what a function reaches in ways that cannot be seen beforehand is put into eval mode when it is called, unless
    # there is a compiled network, which would be compiled anew for the hook
    seen = isinstance(model, nn.Module) or any("_orig_mod" in network._modules for network in networks)
    with eval_mode(*networks), nullcontext() if seen else eval_mode_when_called(), torch.no_grad():
        try:
            yield look
        finally:
            # Inside an outer autocast, low-precision copies of weights that were made here without gradient must not
            # serve the training forward: torch without its pull request 165068 would give the weights no gradient.
            torch.clear_autocast_cache()


def as_output(result: object) -> Output:
    """An `Output` from what a model returned: an `Output`, or a pair (features, logits)."""
    if isinstance(result, Output):
        return result
    if isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(part, Tensor) for part in result):
        return Output(logits=result[1], features=result[0])
    raise UserError(
        f"the model returned {_describe(result)}, but features and logits are needed; "
        "pass a function images -> (features, logits) that calls your model"
    )


def embed(
    model: Callable[[Tensor], object],
    images: Tensor,
    items: Items,
    *,
    autocast: Autocast = nullcontext,
    log_probabilities: bool = True,
    probabilities: Probabilities | None = None,
) -> Embedded:
    """Features (and log-probabilities) of `images [n,C,H,W]`, float32, in eval mode and without gradient.

    The model is as before: running statistics, the mode of each module (also when its forward raises) and gradients.
    Wrappers of several processes are bypassed, so processes may call this a different number of times. Features of more
    than two dimensions (experts `[n,E,D]`) are flattened per image. `probabilities(output) [n,K]` is how a method reads
    its logits; None is softmax.

    Raises UserError when the model gives no features.
    """
    with looking(model, autocast) as look:
        output = look(images)
        if output.features is None:
            raise UserError("the model's Output has no features; fill Output.features in its forward")
        # A copy: a compiled model with CUDA graphs writes its next result into the same memory.
        features = output.features.flatten(1).clone()
        return Embedded(items, features, _log_probabilities(output, probabilities) if log_probabilities else None)


def make_embed(
    model: Callable[[Tensor], object],
    fetch: Callable[[Items], Batch],
    *,
    autocast: Autocast = nullcontext,
    log_probabilities: bool = True,
    probabilities: Probabilities | None = None,
) -> Embed:
    """An `Embed`, items to `Embedded`, from a model and a way to read the pixels of items."""

    def embed_items(items: Items, /) -> Embedded:
        batch = fetch(items)
        return embed(
            model,
            batch.images,
            batch.items,
            autocast=autocast,
            log_probabilities=log_probabilities,
            probabilities=probabilities,
        )

    return embed_items


def _log_probabilities(output: Output, probabilities: Probabilities | None) -> Tensor:
    if probabilities is None:
        return output.logits.log_softmax(dim=1)
    chosen = probabilities(output).float()
    return chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()


def _float(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float()


def _training_modules(networks: tuple[nn.Module, ...]) -> list[nn.Module]:
    # Module.modules() takes five times as long, which shows when a step looks at two small batches.
    found: list[nn.Module | None] = list(networks)
    for module in found:
        if module is not None and module._modules:
            found.extend(module._modules.values())
    return [module for module in dict.fromkeys(found) if module is not None and module.training]


def _set_training(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        # Past Module.__setattr__, which sorts every value into parameters, buffers, modules: microseconds for each of
        # 84 modules.
        state = module.__dict__
        if "training" in state:
            state["training"] = training
        else:  # a scripted module keeps its mode elsewhere
            module.training = training


def _describe(result: object) -> str:
    return f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
