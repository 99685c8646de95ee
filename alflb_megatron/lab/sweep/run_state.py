"""Where the runs of a sweep stand, read from their folders alone, so that a sweep can be stopped at any moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alflb_megatron.lab.records.run_folder import has_checkpoint, is_run_folder, saved_settings
from alflb_megatron.lab.sweep.plan import Run, same_settings
from alflb_megatron.settings import SettingError

NEW, BROKEN, DONE, SUBMITTED = "new", "broken off", "finished", "submitted"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `kind` is NEW, BROKEN (goes on from its checkpoint if there is one), DONE or SUBMITTED."""

    kind: str
    checkpoint: bool = False


def state_of(run: Run, out: Path) -> RunState:
    """Reads it from the run's folder. Raises `SettingError` where the folder holds a run of other settings."""
    folder = out / run.name
    submitted = submission_file(run, out).exists()
    if not is_run_folder(folder):
        return RunState(SUBMITTED if submitted else NEW)
    different = same_settings(saved_settings(folder, "--out"), run.plan.as_dict())
    if different:
        held = "; ".join(different[:4])
        raise SettingError("--out", folder, f"holds a run of other settings ({held}): name another folder")
    if (folder / "summary.json").is_file():
        return RunState(DONE)
    return RunState(SUBMITTED if submitted else BROKEN, has_checkpoint(folder))


def submission_file(run: Run, out: Path) -> Path:
    """The file that says that a run was handed to a cluster."""
    return out / f"{run.name}.submitted.json"
