"""Which routers a model holds, and what each is called.

A router is told from others by being that object: wrappers (PEFT's) forward its attributes and hold copies of it. In
logs, files and messages it is its path in the whole model, of which the layer's number is one part. The number alone
is not unique where a model holds several stacks (a student and its teacher, two towers) or wrapped copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
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


WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What torch's wrappers call the module inside them: no part of its name, as in torch's own fully qualified names."""


def named_routers(model: Sequence[nn.Module]) -> list[NamedRouter]:
    """Every router of Megatron-Core's class or ours in the chunks of `model`, each object once.

    A shallow copy shares weights, bias and counts with its original: the two are one. Two that would have one path, as
    a copy that keeps its original's number does, are called by their own modules.
    """
    found: dict[int, NamedRouter] = {}
    own: dict[int, str] = {}
    for chunk in model:
        for path, module in chunk.named_modules():
            if isinstance(module, TopKRouter) and (key := id(module._buffers)) not in found:
                found[key] = _named(chunk, path, module)
                own[key] = path
    count = Counter(named.path for named in found.values())
    return [
        named if count[named.path] == 1 else named._replace(path=_bare(own[key].split(".")))
        for key, named in found.items()
    ]


def _named(chunk: nn.Module, path: str, router: Any) -> NamedRouter:
    inside, parts = [], []  # of `path`, up to and with each part of the name
    for end, part in enumerate(given := path.split("."), 1):
        if part not in WRAPPERS:
            parts.append(part)
            inside.append(".".join(given[:end]))
    number, layers = router.layer_number or 0, router.config.num_layers
    places = [i for i, part in enumerate(parts[1:], 1) if part.isdigit() and parts[i - 1] == "layers"]
    if not places:
        return NamedRouter(_bare(parts), number, "", chunk, router)
    at = next((i for i in places if parts[i - 2 : i - 1] == ["mtp"]), places[-1])
    stack = block = parts[: at - 1]
    if block[-1:] == ["mtp"]:
        # An MTP depth holds one layer, or in a hybrid model a stack that numbers its own from 1. Up to 0.16
        # Megatron-Core has the first kind follow the decoder's last layer, from 0.17 on it numbers it from 1 too.
        depth: Any = chunk.get_submodule(inside[at])
        index = depth.layer_number - 1
        inner = next((i for i, part in enumerate(parts) if i > at and part == "layers"), None)
        if inner is not None:
            number += layers + index * len(list(chunk.get_submodule(inside[inner]).children()))
        elif number == depth.layer_number:
            number += layers
        stack = [*block[:-1], "decoder"]
    else:
        index = number - 1 if number else int(parts[at])
    path = _bare([*parts[:at], str(index), *parts[at + 1 :]])
    return NamedRouter(path, number, _bare(stack), chunk.get_submodule(inside[at - 2] if at > 1 else ""), router)


def _bare(parts: Sequence[str]) -> str:
    """A path without what torch's wrappers put into it, and DDP and Float16Module before it."""
    named = [part for part in parts if part not in WRAPPERS]
    first = next((i for i, part in enumerate(named) if part != "module"), len(named))
    return ".".join(named[first:])


def labels(layers: Sequence[int], paths: Sequence[str]) -> list[str]:
    """What each router is called in a line of text: `layer 3`, or its path where that number stands for several."""
    count = Counter(layers)
    return [f"layer {n}" if count[n] == 1 else path for n, path in zip(layers, paths, strict=True)]


def of_one_stack(
    model: Sequence[nn.Module],
    stack: str | None,
    flag: str,
    value: object,
    group: dist.ProcessGroup | None = None,
) -> dict[int, Any]:
    """The routers of one stack by their layer; none where this pipeline stage holds none of them.

    Without `stack` the only one there is, or else the only one that trains: a student, not its teacher. Of wrapped
    copies of a router it is the one that trains. With `group`, the pipeline-parallel group, all stages decide together,
    and all its ranks call it.

    Raises:
        SettingError: naming `flag`, `value` and what there is, where that leaves none or several; every stage raises.
    """
    stacks: dict[str, list[NamedRouter]] = {}
    for router in named_routers(model):
        stacks.setdefault(router.stack, []).append(router)
    trains = {name: any(_trains(router.block) for router in routers) for name, routers in stacks.items()}
    for part in of_all_stages(trains, group):
        for name, also in part.items():
            trains[name] = trains.get(name, False) or also
    name = _chosen(trains, stack, flag, value)
    refused, found = None, {}
    try:
        for router in stacks.get(name, []):
            copies = [other for other in stacks[name] if other.layer == router.layer]
            found[router.layer] = _only(copies, flag, value).router
    except SettingError as error:
        refused = error
    for refusal in of_all_stages(refused and (refused.flag, refused.value, refused.allowed), group):
        if refusal:
            raise SettingError(*refusal)
    return found


def of_all_stages(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """What each rank of `group`, the pipeline-parallel group, has, in their order; every one of them calls it."""
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    parts = [mine] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return parts


def _chosen(trains: dict[str, bool], stack: str | None, flag: str, value: object) -> str:
    if stack is not None:
        if trains and stack not in trains:
            raise SettingError("stack", stack, f"must be one of {_listed(trains)}")
        return stack
    names = list(trains)
    if len(names) > 1:
        trained = [name for name in names if trains[name]]
        names = trained if len(trained) == 1 else names
    if len(names) > 1:
        raise SettingError(flag, value, f"is for one stack of layers; say which: stack= one of {_listed(names)}")
    return names[0] if names else ""


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


def bare(chunk: nn.Module) -> nn.Module:
    """A chunk without DDP, Float16Module and `torch.compile` around it, which may come later."""
    while isinstance(inner := getattr(chunk, "_orig_mod", getattr(chunk, "module", None)), nn.Module):
        chunk = inner
    return chunk
