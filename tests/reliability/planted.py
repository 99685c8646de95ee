"""Defects to plant in every rank of a run: with each of them faults must be lost, or the harness sees nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def in_place() -> None:
    """Checkpoints are written under their final name, job.json first."""
    import torch.distributed as dist

    from alflb_megatron.lab.training import checkpoint

    def save(setup: Any, plan: Any, step: int, folder: Path, fingerprint: str) -> Path:
        final = folder / f"step_{step:08d}"
        if dist.get_rank() == 0:
            checkpoint._remove(final)
            final.mkdir(parents=True)
            values = {"step": step, "layout": checkpoint.layout_of(plan), "fingerprint": fingerprint}
            checkpoint.write_json(final / checkpoint.JOB, values)
        dist.barrier()
        state = checkpoint._model_state(setup)
        state["optimizer"] = checkpoint._optimizer_state(setup, state, is_loading=False)
        state["random"] = checkpoint._random_state()
        checkpoint.dist_checkpointing.save(state, str(final))
        dist.barrier()
        return final

    checkpoint.save = save


def bias_forgotten() -> None:
    """A resumed run starts with a rule whose number of updates is zero again."""
    from alflb_megatron.lab.training import checkpoint

    plain = checkpoint.load

    def load(setup: Any, *args: Any, **kwargs: Any) -> None:
        plain(setup, *args, **kwargs)
        for router in setup.balancer.routers:
            router.alf_n.zero_()

    checkpoint.load = load


def momentum_forgotten() -> None:
    """A resumed run starts with Adam's second moment a bit off."""
    from alflb_megatron.lab.training import checkpoint

    plain = checkpoint.load

    def load(setup: Any, *args: Any, **kwargs: Any) -> None:
        plain(setup, *args, **kwargs)
        for optimizer in setup.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                state["exp_avg_sq"] *= 1 + 2**-20

    checkpoint.load = load


def tokens() -> None:
    """A resumed run starts one sample later."""
    from alflb_megatron.lab.training import train

    plain = train.TrainingRun._batches

    def batches(self: Any, data: Any, step: int) -> Any:
        return plain(self, data, step + (1 if self.start else 0))

    train.TrainingRun._batches = batches


DEFECTS = {
    "in place": in_place,
    "bias forgotten": bias_forgotten,
    "momentum forgotten": momentum_forgotten,
    "tokens": tokens,
}
