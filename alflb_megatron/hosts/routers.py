"""Which routers a model holds, and what each is called.

A router is told from others by being that object: wrappers (PEFT's) forward its attributes and hold copies of it. In
logs, files and messages it is its path in the whole model, of which the layer's number is one part. The number alone
is not unique where a model holds several stacks (a student and its teacher, two towers) or wrapped copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from alflb_megatron.settings import SettingError


class NamedRouter(NamedTuple):
    """A router of a model.

    path: in the whole model, unique, whatever wraps it and however it is split into stages and chunks. layer: its
    number in its stack, from 1; MTP layers follow the decoder's last. stack: path of the block that numbers its layers.
    """

    path: str
    layer: int
    stack: str
    block: nn.Module
    router: Any


def named_routers(model: Sequence[nn.Module]) -> list[NamedRouter]:
    """Every router of Megatron-Core's class or ours in the chunks of `model`, each object once."""
    found: dict[int, NamedRouter] = {}
    for chunk in model:
        for path, module in chunk.named_modules():
            if isinstance(module, TopKRouter) and id(module) not in found:
                found[id(module)] = _named(chunk, path, module)
    return list(found.values())


def _named(chunk: nn.Module, path: str, router: Any) -> NamedRouter:
    parts = path.split(".")
    number, layers = router.layer_number or 0, router.config.num_layers
    at = next((i for i, part in enumerate(parts[1:], 1) if part.isdigit() and parts[i - 1] == "layers"), None)
    if at is None:
        return NamedRouter(_bare(parts), number, "", chunk, router)
    stack = block = parts[: at - 1]
    if block[-1:] == ["mtp"]:
        # An MTP depth holds one layer, or in a hybrid model a stack that numbers its own from 1. Up to 0.16
        # Megatron-Core has the first kind follow the decoder's last layer, from 0.17 on it numbers it from 1 too.
        depth: Any = chunk.get_submodule(".".join(parts[: at + 1]))
        index = depth.layer_number - 1
        inner = next((i for i, part in enumerate(parts) if i > at and part == "layers"), None)
        if inner is not None:
            number += layers + index * len(list(chunk.get_submodule(".".join(parts[: inner + 1])).children()))
        elif number <= layers:
            number += layers
        stack = [*block[:-1], "decoder"]
    else:
        index = number - 1
    path = _bare([*parts[:at], str(index), *parts[at + 1 :]])
    return NamedRouter(path, number, _bare(stack), chunk.get_submodule(".".join(block)), router)


def _bare(parts: Sequence[str]) -> str:
    """A path without what DDP and Float16Module put before it."""
    first = next((i for i, part in enumerate(parts) if part != "module"), len(parts))
    return ".".join(parts[first:])


def labels(layers: Sequence[int], paths: Sequence[str]) -> list[str]:
    """What each router is called in a line of text: `layer 3`, or its path where that number stands for several."""
    count = Counter(layers)
    return [f"layer {n}" if count[n] == 1 else path for n, path in zip(layers, paths, strict=True)]


def of_one_stack(model: Sequence[nn.Module], stack: str | None, flag: str, value: object) -> dict[int, Any]:
    """The routers of one stack by their layer.

    Without `stack` the only one there is, or else the only one that trains: a student, not its teacher. Of wrapped
    copies of a router it is the one that trains.

    Raises:
        SettingError: naming `flag`, `value` and what there is, where that leaves none or several.
    """
    routers = named_routers(model)
    stacks = {router.stack for router in routers}
    if stack is not None:
        if stack not in stacks:
            raise SettingError("stack", stack, f"must be one of {_listed(stacks)}")
        stacks = {stack}
    elif len(stacks) > 1:
        trained = {router.stack for router in routers if _trains(router.block)}
        stacks = trained if len(trained) == 1 else stacks
    if len(stacks) > 1:
        raise SettingError(flag, value, f"is for one stack of layers; say which: stack= one of {_listed(stacks)}")
    by_layer: dict[int, list[NamedRouter]] = {}
    for router in routers:
        if router.stack in stacks:
            by_layer.setdefault(router.layer, []).append(router)
    return {layer: _only(found, flag, value).router for layer, found in by_layer.items()}


def _only(found: list[NamedRouter], flag: str, value: object) -> NamedRouter:
    if len(found) > 1:
        found = [router for router in found if _trains(router.router)] or found
    if len(found) > 1:
        paths = _listed(router.path for router in found)
        raise SettingError(flag, value, f"is for one router a layer; layer {found[0].layer} has {paths}")
    return found[0]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
