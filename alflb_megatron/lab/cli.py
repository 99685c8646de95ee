"""`alflb`: a thin front. A command is a module with `add_arguments` and `run`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from alflb_megatron import __version__
from alflb_megatron.hosts.errors import exit_with_error
from alflb_megatron.lab.training.launch import under_a_launcher
from alflb_megatron.settings import SettingError


@dataclass(frozen=True)
class Command:
    """What a command does, the module that does it, and the packages that it needs beyond the plug-in's own."""

    help: str
    module: str
    needs: tuple[str, ...] = ()
    extra: str = "lab"


COMMANDS = {
    "train": Command("train a DeepSeekMoE with Megatron-Core and watch its balance", "training.command", ("tqdm",)),
    "demo": Command("train without a bias, with the built-in and with ours", "sweep.demo", ("tqdm", "matplotlib")),
    "data": Command("make training data of text, in Megatron's format, or check it", "data.prepare", ("tqdm",)),
    "replay": Command("compare rules over recorded router scores", "replay.command", ("tqdm", "matplotlib")),
    "theory": Command("measure what the theory claims", "theory.command", ("scipy", "matplotlib", "tqdm")),
    "patch": Command("put the flags of ALF-LB into a checkout of Megatron-LM, or take them out", "tools.patch"),
    "doctor": Command("say what of the hosts is installed, and which path each feature takes", "tools.doctor"),
    "bias": Command("show expert biases, or write them for Hugging Face's models", "tools.bias"),
    "report": Command("draw one page about one or several runs", "report.command", ("jinja2", "matplotlib")),
    "reproduce": Command(
        "train a plan's runs, and draw them", "sweep.command", ("yaml", "matplotlib", "scipy", "tqdm")
    ),
    "watch": Command("show a running job in the terminal", "watch.command", ("rich",)),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(re.sub(r"^argument ", "", message).split())
        text = text if len(text) <= 500 else f"{text[:500]}..."
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def missing(command: Command) -> list[str]:
    """The packages that `command` needs and that are not installed."""
    return [name for name in command.needs if importlib.util.find_spec(name) is None]


def parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The command line, with the flags of the command that `words` begin with."""
    top = _Parser(prog="alflb", description="Auxiliary-loss-free load balancing for Megatron-Core.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"alflb {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, allow_abbrev=False)
        if words and words[0] == name:
            if lacking := missing(command):
                install = f"pip install 'alflb_megatron[{command.extra}]'"
                added.exit(2, f"alflb: {name} needs {', '.join(lacking)}: {install}\n")
            module = importlib.import_module(f"alflb_megatron.lab.{command.module}")
            module.add_arguments(added)
            added.set_defaults(run=module.run)
    return top


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments that `words` come to; SystemExit with one line where they cannot be read."""
    return parser(words).parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a setting that cannot work, 1 for a failed run."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = parse(words)
        return int(arguments.run(arguments, words))
    except SettingError as error:
        if under_a_launcher():
            exit_with_error(error)
        print(f"alflb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
