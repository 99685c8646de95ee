"""Kills the ranks of training runs, many times in each, and compares every run with one that nobody killed.

    python -m tests.reliability.faults --kills 20 --steps 9 --seed 0 --out faults.json

A run is started, killed at a moment drawn from the seed, restarted from its last checkpoint as a launcher would, and so
on until it is done. A fault is survived where the end is the uninterrupted run bit for bit: losses, learning rates,
gradient norms, loads, biases, validation, tokens, and every checkpoint with weights, optimizer, rule state and random
state. Otherwise all faults of that run are lost, and the text says what differs and how to do it again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.moments import MOMENTS, Fault

TEXT = Path(__file__).parents[2] / "LICENSE"
EVERY = 3  # steps between checkpoints
KILLS_A_RUN = 10

VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive, ep 2": {"rule": "adaptive", "ep": 2},
    "adaptive, ep 2, distributed optimizer": {"rule": "adaptive", "ep": 2, "optimizer": "distributed"},
    "sign, pp 2": {"rule": "sign", "pp": 2},
    "adaptive, ep 2, fp16: no step made yet": {"rule": "adaptive", "ep": 2, "dtype": "fp16"},
    "sign, ep 1": {"rule": "sign", "micro_batch_size": 1},
    "adaptive, pp 2, distributed optimizer": {"rule": "adaptive", "pp": 2, "optimizer": "distributed"},
    "adaptive, ep 1, distributed, bf16": {"rule": "adaptive", "optimizer": "distributed", "dtype": "bf16"},
}
"""Splits, rules and optimizers of the runs; two ranks each."""


def plan(variant: str, steps: int, out: Path, resume: bool = False) -> Any:
    from tests.distributed import jobs

    job = {
        "nproc": 2,
        "ep": 1,
        "steps": steps,
        "save_every": EVERY,
        "global_batch_size": 4,
        "validation_sequences": 8,
        "data": str(TEXT),
        "out": str(out),
        "resume": resume,
    }
    return jobs.plan({**job, **VARIANTS[variant]}, {"vocab_size": 256})


@dataclass
class Chain:
    """One run that is killed again and again."""

    variant: str
    seed: str
    folder: Path
    steps: int
    faults: list[Fault] = field(default_factory=list)
    half_written: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def __str__(self) -> str:
        faults = "; ".join(f"{i}. {fault}" for i, fault in enumerate(self.faults, 1)) or "no fault yet"
        return f"{self.variant}, seed {self.seed}: {'; '.join(self.problems[:4]) or 'no difference'}. Faults: {faults}"


class Deck:
    """Moments in a random order, each as often as every other; blind ones three times as often."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.cards: list[str] = []

    def take(self, allowed: set[str]) -> str:
        """The next moment that is allowed; those passed over stay."""
        while not allowed & set(self.cards):
            fresh = [*MOMENTS, "blind", "blind"]
            self.draw.shuffle(fresh)
            self.cards += fresh
        index = next(i for i, card in enumerate(self.cards) if card in allowed)
        return self.cards.pop(index)

    def put_back(self, card: str) -> None:
        """The run ended before this moment came: another one shall have it."""
        self.cards.append(card)


def kill_until_done(chain: Chain, kills: int, reference: Path, seconds: float, deck: Deck, draw: random.Random) -> None:
    """Runs the chain to its end with at most `kills` faults and notes every difference.

    reference: the folder of the uninterrupted run. seconds: how long that took, the range of blind delays.
    """
    from tests.reliability import compare, ranks

    compared: set[str] = set()
    for _ in range(2 * kills + 3):
        start = latest(chain)
        if start == chain.steps and (chain.run / "summary.json").exists():
            break  # the last kill found it finished
        plan_ = plan(chain.variant, chain.steps, chain.run, resume=start > 0)
        fault = draw_fault(deck, draw, start, chain.steps, seconds) if _left(chain, kills, start) else None
        try:
            ended = ranks.attempt(plan_, chain.folder, fault, grace=draw.random() * 0.3)
        except ranks.Hung as error:
            chain.faults += [fault] if fault else []
            chain.problems.append(str(error))
            break
        if ended.struck and fault is not None:
            chain.faults.append(fault)
            chain.problems += after_a_kill(chain, fault, ended.step, start)
        elif not ended.done:
            chain.problems.append(f"not restarted after a kill: {ended.statuses}, {ranks.output(chain.folder)}")
        if fault is not None and not ended.struck:
            deck.put_back(fault.moment)
        for name in compare.checkpoints(chain.run).keys() - compared:
            chain.problems += compare.checkpoint(chain.run, reference / "run", name)
            compared.add(name)
        if ended.done or chain.problems:
            break
    else:
        chain.problems.append("the run did not come to an end")
    if not chain.problems:
        chain.problems += compare.runs(chain.run, reference / "run")
        chain.problems += tokens_differ(chain.folder, reference)


def _left(chain: Chain, kills: int, start: int) -> bool:
    return len(chain.faults) < kills and start < chain.steps


def latest(chain: Chain) -> int:
    """The step from which the run goes on: that of its last whole checkpoint, 0 without one."""
    from alflb_megatron.lab.training import checkpoint
    from alflb_megatron.settings import SettingError

    try:
        saved = checkpoint.find(chain.run, "--resume")
    except SettingError:
        return 0
    return saved.step


def draw_fault(deck: Deck, draw: random.Random, start: int, steps: int, seconds: float) -> Fault:
    """The next fault of a run that goes on after step `start`."""
    moment = deck.take(set(MOMENTS) - (set() if start else {"load"}))
    return Fault(
        moment,
        rank=draw.choice(MOMENTS[moment].ranks),
        step=draw.randint(start + 1, min(start + EVERY + 1, steps)),
        call=draw.randint(1, MOMENTS[moment].calls),
        delay=draw.uniform(0.0, 0.8 * seconds) if moment == "blind" else 0.0,
    )


def after_a_kill(chain: Chain, fault: Fault, step: int | None, start: int) -> Iterator[str]:
    """What is wrong with the run folder right after a fault, before anything is restarted."""
    from tests.reliability import compare

    folder = chain.run / "checkpoints"
    parts = [path for path in folder.glob("step_*") if path.suffix == ".part"] if folder.exists() else []
    chain.half_written += len(parts)
    whole = {int(name.removeprefix("step_")) for name in compare.checkpoints(chain.run)}
    found = latest(chain)
    if found != max(whole, default=0):
        yield f"after {fault}: step {found} is taken for the last checkpoint of {sorted(whole)}"
    if found < start:
        yield f"after {fault}: the checkpoint of step {start} is gone"
    moment = MOMENTS[fault.moment]
    if moment.saving and step is not None and (step in whole) != moment.whole:
        yield f"after {fault}: the checkpoint of step {step} {'has' if step in whole else 'lacks'} its final name"


def tokens_differ(mine: Path, theirs: Path) -> list[str]:
    """Whether every attempt gave every rank the tokens that the uninterrupted run gave it."""
    from tests.reliability import ranks

    a, b = ranks.tokens(mine), ranks.tokens(theirs)
    return [
        f"tokens of {key}: {a.get(key)} and {b.get(key)}" for key in a.keys() | b.keys() if a.get(key) != b.get(key)
    ]


def uninterrupted(variant: str, steps: int, folder: Path) -> float:
    """The run that nobody kills; returns its seconds. RuntimeError where it does not train."""
    from tests.reliability import ranks

    ended = ranks.attempt(plan(variant, steps, folder / "run"), folder, None)
    if not ended.done:
        raise RuntimeError(f"{variant}: not trained without a fault: {ended.statuses}, {ranks.output(folder)}")
    return ended.seconds


def campaign(kills: int, steps: int, seed: int, variants: list[str], work: Path, out: Path | None) -> dict[str, Any]:
    """`kills` faults over the variants in turn; the figures of faults.json, written to `out` after each run."""
    from alflb_megatron.lab.records.files import write_json

    began = time.monotonic()
    draw = random.Random(seed)
    decks = Deck(draw)
    chains: list[Chain] = []
    struck = 0
    share = {variant: kills // len(variants) + (i < kills % len(variants)) for i, variant in enumerate(variants)}
    for number, variant in enumerate(variants):
        reference = work / f"{number}-whole"
        seconds = uninterrupted(variant, steps, reference)
        left, fruitless = share[variant], 0
        while left > 0:
            index = len(chains)
            chain = Chain(variant, f"{seed}, run {index}", work / f"{number}-{index}", steps)
            kill_until_done(chain, min(left, KILLS_A_RUN), reference, seconds, decks, draw)
            chains.append(chain)
            fruitless = 0 if chain.faults else fruitless + 1  # a blind kill may come after the end
            if fruitless > 10:
                chain.problems.append("no fault falls any more")
            left -= len(chain.faults)
            struck += len(chain.faults)
            if out is not None:
                write_json(out, figures(chains, steps, seed, time.monotonic() - began))
            print(f"{struck} of {kills} faults, {time.monotonic() - began:.0f} s: {chain}", flush=True)
            if chain.problems:
                break
            shutil.rmtree(chain.folder)
    return figures(chains, steps, seed, time.monotonic() - began)


def figures(chains: list[Chain], steps: int, seed: int, seconds: float) -> dict[str, Any]:
    """Faults tried, survived and lost: in all, by moment, by variant."""

    def count(pairs: list[tuple[Chain, Fault]]) -> dict[str, int]:
        survived = sum(not chain.problems for chain, _ in pairs)
        return {"tried": len(pairs), "survived": survived, "lost": len(pairs) - survived}

    pairs = [(chain, fault) for chain in chains for fault in chain.faults]
    variants = list(dict.fromkeys(chain.variant for chain in chains))
    return {
        **count(pairs),
        "seed": seed,
        "steps_a_run": steps,
        "runs": len(chains),
        "half_written_checkpoints_left": sum(chain.half_written for chain in chains),
        "by_moment": {m.text: count([pair for pair in pairs if pair[1].moment == name]) for name, m in MOMENTS.items()},
        "by_rank": {str(rank): count([pair for pair in pairs if pair[1].rank == rank]) for rank in (0, 1)},
        "by_variant": {v: count([pair for pair in pairs if pair[0].variant == v]) for v in variants},
        "problems": [str(chain) for chain in chains if chain.problems],
        "seconds": round(seconds),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills training runs and compares them with one that nobody killed.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3 * EVERY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--plant", choices=("in place", "bias forgotten", "tokens", "momentum forgotten"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.reliability import planted, ranks

    ranks.prepare()
    if arguments.plant:
        ranks.PLANTED.append(planted.DEFECTS[arguments.plant])
    work = Path(tempfile.mkdtemp(prefix="alflb-faults-"))
    try:
        found = campaign(arguments.kills, arguments.steps, arguments.seed, arguments.variants, work, arguments.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(found, indent=2))
    return 0 if found["lost"] == 0 and not found["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
