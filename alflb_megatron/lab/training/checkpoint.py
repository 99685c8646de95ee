"""Checkpoints of `alflb train`, by Megatron-Core's dist_checkpointing (torch_dist).

A checkpoint is a folder `step_00000100` with Megatron's files and `job.json`. It is written under another name and
renamed when every rank is done, so a folder with its final name is whole, and the one with the highest step the latest.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from alflb_megatron.hosts import absent_state
from alflb_megatron.lab.checkpoints.scan import scan_checkpoint
from alflb_megatron.lab.data.errors import one_line
from alflb_megatron.lab.records.files import read_json, write_json
from alflb_megatron.lab.training.build import ModelSetup
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.settings import SettingError

logger = logging.getLogger(__name__)

JOB, PARTIAL = "job.json", ".part"

METADATA = {"chained_optim_avoid_prefix": True, "distrib_optim_sharding_type": "fully_reshardable"}
"""Megatron-Core's checkpoint format in which optimizer state can be read on another split."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """What `job.json` says of a checkpoint: where training stood, on which split, with which data."""

    path: Path
    step: int
    layout: dict[str, int]
    fingerprint: str
    flag: str = "--load"  # by which it was named


def layout_of(plan: Plan) -> dict[str, int]:
    job = plan.job
    return {"nproc": job.nproc, "tp": job.tp, "pp": job.pp, "vpp": job.vpp, "ep": job.ep, "etp": job.etp}


def find(path: str | Path, flag: str) -> SavedCheckpoint:
    """The checkpoint at `path`: a checkpoint folder, a `checkpoints` folder or a run folder (then its latest).

    It is scanned (`checkpoints/scan.py`): to load it executes nothing of it. Raises SettingError naming `flag` where
    there is none, it is not whole, or holds what no checkpoint of `alflb train` does.
    """
    try:
        return _find(Path(path), flag, path)
    except OSError as error:
        raise SettingError(flag, path, f"cannot be read ({error.strerror})") from None


def _find(folder: Path, flag: str, path: str | Path) -> SavedCheckpoint:
    for candidate in (folder, folder / "checkpoints"):
        # Whole ones have their final name and job.json; the numbers are padded, so the last by name is the latest.
        if whole := sorted(p.parent for p in candidate.glob(f"step_*/{JOB}") if p.parent.suffix != PARTIAL):
            folder = whole[-1]
            break
    try:
        saved = _saved(folder, read_json(folder / JOB), flag)
    except (FileNotFoundError, NotADirectoryError):
        raise SettingError(flag, path, "must name a run with a checkpoint, or a checkpoint folder") from None
    except (ValueError, OSError) as error:
        raise SettingError(flag, path, f"holds a checkpoint whose {JOB} cannot be read ({error})") from None
    scan_checkpoint(folder, flag, path)
    return saved


def _saved(folder: Path, values: Any, flag: str) -> SavedCheckpoint:
    """What `save` wrote to job.json; ValueError for anything else."""
    if not isinstance(values, dict) or not {"step", "layout", "fingerprint"} <= values.keys():
        raise ValueError("step, layout or fingerprint is missing")
    step, layout, fingerprint = values["step"], values["layout"], values["fingerprint"]
    if type(step) is not int or not 1 <= step < 2**63:
        raise ValueError("step is no number of steps")
    if not isinstance(layout, dict) or not all(type(size) is int for size in layout.values()):
        raise ValueError("layout holds what is no number of ranks")
    if not isinstance(fingerprint, str):
        raise ValueError("fingerprint is no text")
    return SavedCheckpoint(folder, step, layout, fingerprint, flag)


def _model_state(setup: ModelSetup) -> dict[str, Any]:
    """Sharded model state, one entry a chunk, named as Megatron-LM names them."""
    chunks = [unwrap_model(chunk) for chunk in setup.chunks]
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict(metadata=dict(METADATA))}
    return {f"model{i}": chunk.sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(chunks)}


def _random_state() -> ShardedObject:
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _optimizer_state(setup: ModelSetup, model: dict[str, Any], is_loading: bool) -> Any:
    flat = model.get("model", model)
    return setup.optimizer.sharded_state_dict(flat, is_loading=is_loading, metadata=dict(METADATA))


def _begin_moments(optimizer: Any) -> bool:
    """Gives optimizers that have not made a step yet their state, of zeros: a checkpoint without it cannot be loaded.

    With a dynamic loss scale the first steps are skipped, and Adam makes its state at its first step. Returns whether
    PyTorch's Adam is among them.
    """
    plain = [part for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.Adam)]
    for part in optimizer.chained_optimizers:
        if not part.optimizer.state and part.optimizer.param_groups:
            part.init_state_fn(part.optimizer, part.config)
            if part in plain:
                for state in part.optimizer.state.values():
                    state["step"] = torch.tensor(0.0)  # which Adam looks for where there is other state
    return bool(plain)


def _keep_step_zero(saved: dict[Any, Any]) -> None:
    """Puts in the step of an Adam that has made none, which Megatron-Core takes for an absent one."""
    for entry in (saved, *saved.values()):
        if isinstance(entry, dict):
            state = entry.get("optimizer", entry).get("state")
            if isinstance(state, dict) and state and "common_step" not in state:
                state["common_step"] = torch.tensor(0.0)


def save(setup: ModelSetup, plan: Plan, step: int, folder: Path, fingerprint: str) -> Path:
    """Writes the checkpoint of `step` below `folder` (all ranks call it) and returns its path."""
    final = folder / f"step_{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    first = dist.get_rank() == 0
    if first:
        _remove(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _model_state(setup)
    plain = _begin_moments(setup.optimizer)
    state["optimizer"] = _optimizer_state(setup, state, is_loading=False)
    if plain:
        _keep_step_zero(state["optimizer"])
    state["random"] = _random_state()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if first:
        write_json(partial / JOB, {"step": step, "layout": layout_of(plan), "fingerprint": fingerprint})
        _remove(final)
        partial.rename(final)
    dist.barrier()
    return final


def load(setup: ModelSetup, plan: Plan, saved: SavedCheckpoint, weights_only: bool = False) -> None:
    """Reads a checkpoint into `setup` (all ranks call it); biases and rule state come with the model.

    On the split it was written on everything comes back, random state included; on another the random state is that of
    the seed. With `weights_only` the optimizer starts anew. State of ours that the checkpoint lacks starts afresh.
    SettingError where the checkpoint is damaged or is of another model.
    """
    try:
        _load(setup, plan, saved, weights_only)
    except SettingError:
        raise
    # torch's CheckpointException, which it raises for what went wrong on any rank, is no Exception.
    except (Exception, CheckpointException) as error:
        logger.debug("checkpoint %s", saved.path, exc_info=True)
        found = SettingError(saved.flag, saved.path, f"holds a checkpoint that cannot be loaded: {_reason(error)}")
        found.seen_by_one_rank = not isinstance(error, CheckpointException)  # that one reaches every rank
        raise found from error


def _reason(error: BaseException) -> str:
    """The first error that a rank met, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return one_line(error)


def _load(setup: ModelSetup, plan: Plan, saved: SavedCheckpoint, weights_only: bool) -> None:
    state = _model_state(setup)
    same_layout = saved.layout == layout_of(plan)
    if not weights_only:
        state["optimizer"] = _optimizer_state(setup, state, is_loading=True)
        if same_layout:
            state["random"] = _random_state()
    with absent_state.absent_state_allowed():
        loaded = dist_checkpointing.load(state, str(saved.path), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    for i, chunk in enumerate(setup.chunks):
        unwrap_model(chunk).load_state_dict(loaded["model" if len(setup.chunks) == 1 else f"model{i}"])
    if weights_only:
        setup.optimizer.reload_model_params()
        return
    if not same_layout:
        loaded["optimizer"] = _on_this_split(setup.optimizer, loaded["optimizer"])
    setup.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        random = loaded["random"]
        torch.set_rng_state(random["torch"])
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(random["tracker"])


def _on_this_split(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Optimizer state as this split's optimizer takes it.

    Megatron-Core chains one optimizer for the dense and one for the expert parameters where experts are split over
    ranks, and has a single one where they are not. Moments are found by parameter name either way; what is not sharded
    (step and settings of the parameter groups) comes back in the shape it was saved in and is put in its place here.
    """
    chained = optimizer.chained_optimizers

    def inner(entry: dict[Any, Any]) -> dict[Any, Any]:
        return entry.get("optimizer", entry)  # a mixed-precision optimizer wraps Adam's state

    saved = [entry for entry in (loaded, *loaded.values()) if isinstance(entry, dict) and "state" in inner(entry)]
    steps = [inner(entry)["state"]["common_step"] for entry in saved if "common_step" in inner(entry)["state"]]
    whole = {name: value for name, value in loaded.items() if not isinstance(name, int)}
    entries = [whole] if len(chained) == 1 else [loaded[index] for index in range(len(chained))]
    if any("param_state" in entry and "optimizer" not in entry for entry in entries):
        split = "1" if len(chained) == 1 else "above 1"
        allowed = "above 1" if len(chained) == 1 else "1"
        raise SettingError("--ep", split, f"must be {allowed}, as the distributed optimizer's state was saved")
    for part, entry in zip(chained, entries, strict=True):
        state = inner(entry)
        if steps:
            state["state"].setdefault("common_step", steps[0])
        for group, own in zip(state["param_groups"], part.param_groups, strict=True):
            for name, value in own.items():
                group.setdefault(name, value)
    return entries[0] if len(chained) == 1 else dict(enumerate(entries))


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
