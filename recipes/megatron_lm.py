"""Megatron-LM recipes: the DeepSeekMoE models of Wang et al. 2024 (arXiv 2408.15664) and one for a laptop.

    python -m alflb_megatron.recipes.megatron_lm deepseek_moe_1b_alflb --megatron-lm DIR --data PREFIX --tokenizer NAME
    python -m alflb_megatron.recipes.megatron_lm deepseek_moe_3b_alflb --megatron-lm DIR --rule sign --step-size 1e-3 \
        --nodes 4 --rendezvous HOST:29500 --dryrun -- --recompute-granularity selective
    python -m alflb_megatron.recipes.megatron_lm deepseek_moe_tiny_alflb --megatron-lm DIR --steps 20

DIR is a checkout of Megatron-LM, which is looked at: where `alflb patch` was applied ALF-LB is turned on by flags, else
by `--spec` and the environment (hosts/megatron_lm.py). What follows `--` goes to `pretrain_gpt.py` as it is, after the
recipe's own arguments, and so wins over them. `--dryrun` prints a shell script instead of starting torchrun; under a
launcher that has set RANK and WORLD_SIZE this process becomes one of its ranks.

Shapes come from `alflb_megatron.models`, batch, steps and learning rate from `recipes/training.py`. Megatron-LM has no
learning rate that falls in steps, so that of the 3B model is a cosine too. The embedding has the model's 32,064 entries
whatever the tokenizer has; `--vocab-size` sets another number. Variables ALFLB_* of the environment are not handed on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.recipes.megatron_lm_arguments import Launch, Recipe, arguments, outer_ranks, recipe_of
from alflb_megatron.recipes.training import RECIPES
from alflb_megatron.settings import SettingError, add_flags, flag_of, from_mapping, given_flags, knobs, variable_of

SCRIPT = "pretrain_gpt.py"
PATCHED = "from alflb_megatron.hosts import megatron_lm"
"""What `alflb patch` has put into the script."""


# -- ALF-LB, by flags or by the environment --------------------------------------------------------------------------


def alflb_arguments(alf: ALFConfig | None, patched: bool) -> tuple[list[str], dict[str, str]]:
    """What turns ALF-LB on: further arguments and environment variables; the knobs are those that were changed."""
    if alf is None:
        return [], {}
    changed = {
        field.name: getattr(alf, field.name)
        for field, *_ in knobs(ALFConfig)
        if field.name == "rule" or getattr(alf, field.name) != field.default
    }
    if not patched:
        texts = {variable_of(name, PREFIX): str(value) for name, value in changed.items()}
        return ["--spec", "alflb_megatron.hosts.megatron_lm", "block_spec"], texts
    words = []
    for name, value in changed.items():
        flag = flag_of(name, PREFIX)
        words += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
    return words, {}


def is_patched(checkout: Path) -> bool:
    """Whether `alflb patch` was applied; raises `SettingError` where there is no `pretrain_gpt.py` to look at."""
    try:
        return PATCHED in (checkout / SCRIPT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingError("--megatron-lm", checkout, f"must be a checkout of Megatron-LM ({error})") from None


# -- the start ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What is run: torchrun's words, the script's, the variables they need, and folders that go before a path."""

    launcher: list[str]
    script: list[str]
    environment: dict[str, str]
    before: dict[str, str]

    def shell(self) -> str:
        """As a script for bash: one flag a line."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines += [f"export {name}={shlex.quote(value)}${{{name}:+:${name}}}" for name, value in self.before.items()]
        command = "exec torchrun"
        for index, word in enumerate((*self.launcher, *self.script)):
            new = word.startswith("--") or index == len(self.launcher)
            command += (" \\\n    " if new else " ") + shlex.quote(word)
        return "\n".join(["#!/usr/bin/env bash", *lines, command])

    def start(self) -> None:
        """This process becomes torchrun, or under a launcher one of its ranks."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ALFLB_")}
        paths = {name: os.pathsep.join(filter(None, (value, kept.get(name)))) for name, value in self.before.items()}
        launcher = ["-m", "torch.distributed.run", *self.launcher] if outer_ranks() is None else []
        os.execve(sys.executable, [sys.executable, *launcher, *self.script], {**kept, **self.environment, **paths})


def command(recipe: Recipe, further: Sequence[str] = ()) -> Command:
    """The command of a recipe; `further` are arguments of `pretrain_gpt.py` that win over the recipe's."""
    launch, training = recipe.launch, recipe.training
    checkout = Path(launch.megatron_lm).resolve()
    flags, environment = alflb_arguments(recipe.alf, is_patched(checkout))
    launcher = ["--nproc-per-node", str(training.gpus)]
    if training.nodes > 1:
        if not launch.rendezvous and outer_ranks() is None:
            raise SettingError("--rendezvous", "", f"{training.nodes} machines need a HOST:PORT to meet at")
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", launch.rendezvous, "--rdzv-id", recipe.name]
        launcher = ["--nnodes", str(training.nodes), *launcher, *meeting]
    else:
        launcher = ["--standalone", *launcher]
    before = {"PYTHONPATH": str(checkout)}
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    script = [str(checkout / SCRIPT)]
    if not recipe.cuda:
        script = ["-m", "alflb_megatron.hosts.cpu", *script]
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // training.gpus))
    return Command(launcher, [*script, *arguments(recipe), *flags, *further], environment, before)


def _check_files(launch: Launch) -> None:
    for end in (".bin", ".idx") if launch.data else ():
        if not Path(launch.data + end).is_file():
            raise SettingError("--data", launch.data, f"needs the file {launch.data}{end}")


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code where nothing is started: 2 for a setting that cannot work."""
    words = list(sys.argv[1:] if words is None else words)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m alflb_megatron.recipes.megatron_lm",
        usage="%(prog)s RECIPE --megatron-lm DIR [FLAG...] [-- ARGUMENT OF pretrain_gpt.py...]",
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--dryrun", action="store_true", help="print a shell script that starts the run")
    add_flags(parser, Launch)
    add_flags(parser.add_argument_group("how the expert bias moves"), ALFConfig, PREFIX, skip=("rule", "step_size"))
    given = parser.parse_args(words[:split])
    try:
        launch = from_mapping(Launch, given_flags(given, Launch))
        made = command(recipe_of(given.recipe, launch, given_flags(given, ALFConfig, PREFIX)), words[split + 1 :])
        if given.dryrun:
            print(made.shell())
            return 0
        _check_files(launch)
    except SettingError as error:
        print(f"alflb: {error}", file=sys.stderr)
        return 2
    made.start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
