"""`alflb train` on one rank: real Megatron-Core from the process groups to the checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alflb_megatron import metrics
from alflb_megatron.hosts import cpu
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.replay.scores import Gating, clear
from alflb_megatron.lab.tools.bias import starting
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.progress import Progress
from alflb_megatron.lab.training.score_recorder import Recorder
from alflb_megatron.lab.training.step_record import layer_rows, of_layers
from alflb_megatron.settings import SettingError


def train(plan: Plan) -> dict[str, Any]:
    """Trains the plan's model on this rank and returns the summary, on rank 0; the others get {}.

    The ranks are there already (`launch`, or an outer torchrun): RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are set.
    """
    cpu.prepare()  # before Megatron-Core is imported
    from megatron.core import parallel_state

    from alflb_megatron.lab.training import build

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    job = plan.job
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        virtual_pipeline_model_parallel_size=job.vpp if job.vpp > 1 else None,
        expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp,
    )
    build.seed_ranks(job.seed)
    session = _Session(plan)
    try:
        summary = session.run()
    except SettingError as error:
        error.seen_by_one_rank = True
        raise
    # Not on the way out of an error: the other ranks may be inside a collective.
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return summary


class _Session:
    """One training run on one rank, from opened data to the summary."""

    def __init__(self, plan: Plan) -> None:
        from megatron.core import parallel_state

        from alflb_megatron.hosts.expert_bias import load_bias
        from alflb_megatron.lab.data import open_data
        from alflb_megatron.lab.training import build, checkpoint

        job, shape = plan.job, plan.shape
        self.plan, self.job, self.build, self.checkpoint = plan, job, build, checkpoint
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.first = dist.get_rank() == 0
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.first_of_stage = self.dp_rank == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.folder = Path(job.folder)
        self.floor = metrics.sampling_floor(job.global_batch_size * shape.seq_length, shape.topk, shape.num_experts)
        self.validation_batches = max(1, job.validation_sequences // job.global_batch_size)
        self.resumed = checkpoint.find(self.folder, "--resume") if job.resume else None
        self.loaded = checkpoint.find(job.load, "--load") if job.load else None
        self.start = self.resumed.step if self.resumed else 0
        # Killed between its last checkpoint and its summary, a run still has to be validated.
        unfinished = self.start == job.steps and not (self.folder / "summary.json").exists()
        if self.start >= job.steps and not unfinished:
            raise SettingError("--steps", job.steps, f"must be above {self.start}, where the run stands")
        self.training, self.validation = open_data(
            job.data,
            tokenizer=job.tokenizer,
            seq_length=shape.seq_length,
            vocab_size=shape.vocab_size,
            seed=job.seed,
            train_samples=job.steps * job.global_batch_size,
            validation_samples=self.validation_batches * job.global_batch_size,
            cache_dir=None,
        )
        if self.resumed is not None and self.resumed.fingerprint != self.training.fingerprint:
            raise SettingError("--data", job.data, "is not the text, or not the order, that this run was started with")
        # Only now: a run that cannot go on leaves the records of the one it finds as they are.
        self.record = self._run_folder()
        self.trainee = build.trainee(plan)
        if (saved := self.resumed or self.loaded) is not None:
            checkpoint.load(self.trainee, plan, saved, weights_only=self.loaded is not None)
        if job.bias:
            load_bias(self.trainee.chunks, starting(job.bias, shape, plan.score_unit), "--bias")
        self.trainee.scheduler.step(increment=self.start)
        self.regret: list[dict[str, Any]] | None = None

    def _run_folder(self) -> RunFolder | None:
        """The run folder on rank 0, None on the others; what rank 0 finds wrong with it, every rank raises."""
        record: RunFolder | None = None
        refused: list[tuple[str, str, str] | None] = [None]
        if self.first:
            try:
                record = RunFolder(self.folder, resume_step=self.start or None)
                # Scores of another run, or of steps that are trained anew, must not be taken for this one's.
                clear(self.folder, after=0 if self.job.record_scores else self.start)
            except SettingError as error:
                refused = [(error.flag, str(error.value), error.allowed)]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise SettingError(*refused[0])
        return record

    def _warm_start(self, progress: Any) -> None:
        """Calibrates the biases on the first global batches; says what came of it."""
        from alflb_megatron.calibration import warm_start

        batches = self.job.warm_start

        def forward() -> None:
            for step in range(batches):
                self._forward(self._batches(self.training, step), forward_only=True)

        with self._evaluating():
            done = warm_start(self.trainee.balancer, forward)
        rows = self._over_stages(list(zip(done.before.tolist(), done.after.tolist(), strict=True)))
        before, after = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
        progress.note(f"warm start on {batches} global batches: MaxVio {before:.2f} before, {after:.2f} on them after")

    def run(self) -> dict[str, Any]:
        parts = self.build.parts()
        if self.record is not None:
            settings = self.plan.as_dict()
            shape = self.plan.shape
            parameters = {"total": shape.parameters(), "active": shape.parameters(active_only=True)}
            self.record.write_config(settings, settings["alflb"] or {}, parts, parameters)
        with Progress(self.job.steps, start=self.start) if self.first else _Silent() as progress:
            if self.first:
                progress.note("; ".join(f"{name}: {value}" for name, value in parts.items()))
                progress.note(f"text: {self.training.description}")
            if self.job.warm_start and self.resumed is None:
                self._warm_start(progress)
            saved = self._train(progress)
            loss, loads = self.validate()
        return self._summary(loss, loads, saved)

    # -- training ---------------------------------------------------------------------------------------------------

    def _train(self, progress: Any) -> Path | None:
        saved = self.resumed.path if self.resumed is not None and self.start == self.job.steps else None
        recorder = self._recorder() if self.job.record_scores else None
        certifier = self._certifier() if self.job.certify else None
        for step in range(self.start + 1, self.job.steps + 1):
            began = time.perf_counter()
            if certifier is not None:
                certifier.begin(step)
            figures = self._step(step)
            if recorder is not None:
                recorder.write(step)
            record = self._gathered(figures)
            seconds = time.perf_counter() - began
            if certifier is not None and step % self.job.certify == 0:
                record["certificates"] = self._certificates(certifier, progress, step)
            if self.record is not None:
                record |= {"seconds": seconds, "tokens_per_second": record["tokens"] / seconds}
                self.record.append(record)
                progress.step(record)
                if record["rejected"]:
                    layers = ", ".join(map(str, record["rejected"]))
                    progress.note(f"step {step}: scores that are NaN or infinite; the bias of layer {layers} stays")
                for line in record.get("alarms", ()):
                    progress.note(f"step {step}: {line}")
            every = self.job.save_every
            if self.job.save and (step == self.job.steps or (every and step % every == 0)):
                saved = self.checkpoint.save(
                    self.trainee, self.plan, step, self.folder / "checkpoints", self.training.fingerprint
                )
        if certifier is not None:
            self.regret = sorted(self._over_stages(certifier.regret()), key=lambda row: row["layer"])
        return saved

    def _recorder(self) -> Recorder:
        shape, balancer = self.plan.shape, self.trainee.balancer
        return Recorder(
            self.folder,
            dict(zip(balancer.layers, balancer.seats, strict=True)),
            Gating(shape.topk, shape.gate, shape.num_groups, shape.group_topk),
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            steps=min(self.job.record_scores, self.job.steps - self.start),
        )

    def _certifier(self) -> Any:
        from alflb_megatron.lab.training.certificates import Certifier

        balancer = self.trainee.balancer
        # every rank of a pipeline stage holds the same biases: one of them is enough
        routers = dict(zip(balancer.layers, balancer.seats, strict=True)) if self.first_of_stage else {}
        stage = dist.get_rank(self.pp_group)
        return Certifier(routers, self.plan.shape.topk, self.job.certify, self.job.steps, self.folder, stage)

    def _certificates(self, certifier: Any, progress: Any, step: int) -> list[dict[str, Any]]:
        """The certificates of all layers, where they are written; rank 0 says the layer that is farthest off."""
        rows = sorted(self._over_stages(certifier.finish()), key=lambda row: row["layer"])
        if rows:
            worst = max(rows, key=lambda row: row["gap"])
            u = "" if worst["harmonic_step"] is None else f"; u/n needs a u of about {worst['harmonic_step']:.2g}"
            progress.note(
                f"step {step}: layer {worst['layer']} is {worst['gap']:.2e} of score a token from its best bias{u}"
            )
        return rows

    def _step(self, step: int) -> dict[str, Any]:
        """One global batch: forward, backward, update of weights and biases."""
        trainee = self.trainee
        for chunk in trainee.chunks:
            chunk.zero_grad_buffer()
        trainee.optimizer.zero_grad()
        loss = self._forward(self._batches(self.training, step - 1), forward_only=False)
        trainee.scheduler.step(increment=1)
        updated, grad_norm, _ = trainee.optimizer.step()
        shape = self.plan.shape
        return {
            "step": step,
            "loss": loss,
            "lr": trainee.scheduler.get_lr(trainee.optimizer.param_groups[0]),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": not updated,
            "tokens": self.job.global_batch_size * shape.seq_length,
        }

    def _batches(self, data: Any, step: int) -> Iterator[Any]:
        from alflb_megatron.lab.data import micro_batches

        return micro_batches(
            data,
            step=step,
            global_batch_size=self.job.global_batch_size,
            micro_batch_size=self.job.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.job.dp,
        )

    def _forward(self, batches: Iterator[Any], forward_only: bool) -> float:
        """Megatron's forward-backward schedule over one global batch; the mean loss over all its micro-batches."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # Every chunk of an interleaved stage walks through the same micro-batches by itself.
        chunks = self.trainee.chunks
        micro_batches = list(batches)
        losses = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=self.job.global_batch_size // (self.job.micro_batch_size * self.job.dp),
            seq_length=self.plan.shape.seq_length,
            micro_batch_size=self.job.micro_batch_size,
            forward_only=forward_only,
        )
        # Only the last pipeline stage has losses; the sum over all ranks over their number is the mean either way.
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for entry in losses:
            total += torch.stack([entry["loss"].double(), torch.ones_like(entry["loss"], dtype=torch.float64)])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _forward_step(self, batches: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.device)
        extra: dict[str, Tensor] = {}
        if self.plan.shape.mtp_layers:
            extra["loss_mask"] = batch.loss_mask
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, **extra)

        def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (losses.float() * batch.loss_mask).sum() / batch.loss_mask.sum().clamp(min=1)
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place

        return output, mean_loss

    # -- what is measured -------------------------------------------------------------------------------------------

    def _gathered(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds the loads and biases of all pipeline stages to a step's record."""
        last = self.trainee.balancer.last
        record |= of_layers(self._over_stages(layer_rows(last)), self.floor)
        alarms = self._over_stages([] if last is None else list(last.alarms))
        return record | ({"alarms": alarms} if alarms else {})

    def _over_stages(self, rows: list[Any]) -> list[Any]:
        if self.job.pp == 1:
            return rows
        everywhere: list[Any] = [None] * self.job.pp
        dist.all_gather_object(everywhere, rows, group=self.pp_group)
        return [row for stage in everywhere for row in stage]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.trainee.chunks:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk in self.trainee.chunks:
            chunk.train()

    def validate(self) -> tuple[float, list[list[int]]]:
        """Loss over the validation set, and the loads of each MoE layer over the whole of it (Wang et al. 2024)."""
        from alflb_megatron.loads import LoadSum, measuring

        balancer = self.trainee.balancer
        windows = [seat.load_window for seat in balancer.seats]
        with self._evaluating(), measuring(windows):
            losses = [
                self._forward(self._batches(self.validation, step), forward_only=True)
                for step in range(self.validation_batches)
            ]
            seen = LoadSum(windows, balancer.group, with_margins=False).wait() if windows else []
        rows = sorted(
            self._over_stages(
                [(k, row.tolist()) for k, row in zip(balancer.layers, (layer.loads_E for layer in seen), strict=True)]
            )
        )
        return math.fsum(losses) / len(losses), [row for _, row in rows]

    def _summary(self, loss: float, loads: Sequence[Sequence[int]], saved: Path | None) -> dict[str, Any]:
        if self.record is None:
            return {}
        vio = metrics.max_vio(torch.tensor(loads))
        summary = {
            "rule": self.job.rule,
            **summarise(self.record.records()),
            "validation_loss": loss,
            "maxvio_global_mean": float(vio.mean()),
            "maxvio_global_max": float(vio.max()),
            "validation_loads": [list(row) for row in loads],
            **({} if self.regret is None else {"regret": self.regret}),
            "checkpoint": None if saved is None else str(saved),
            "run": str(self.folder),
        }
        self.record.write_summary(summary)
        self.record.close()
        return summary


class _Silent:
    """In place of `Progress` on ranks that show nothing."""

    def step(self, record: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None: ...
