"""`alflb train` on one rank: real Megatron-Core from the process groups to the checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alflb_megatron import metrics
from alflb_megatron.hosts import cpu
from alflb_megatron.lab.records.run_folder import RunFolder
from alflb_megatron.lab.records.summary import summarise
from alflb_megatron.lab.replay.recording import Gating, Layout
from alflb_megatron.lab.replay.score_folder import remove_recorded_scores
from alflb_megatron.lab.replay.score_recorder import ScoreRecorder
from alflb_megatron.lab.tools.bias import initial_biases
from alflb_megatron.lab.training.job import Plan
from alflb_megatron.lab.training.metrics import gather_over_stages, layer_metrics, step_metrics, validation_metrics
from alflb_megatron.lab.training.progress import Progress, SilentProgress
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
    build.tell_micro_batches(job)
    build.seed_ranks(job.seed)
    run = TrainingRun(plan)
    try:
        summary = run.run()
    except SettingError as error:
        error.seen_by_one_rank = True
        raise
    # Not on the way out of an error: the other ranks may be inside a collective.
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return summary


class TrainingRun:
    """One training run on one rank, from opened data to the summary."""

    def __init__(self, plan: Plan) -> None:
        from megatron.core import parallel_state

        from alflb_megatron.hosts.expert_bias import load_bias
        from alflb_megatron.lab.data import open_data
        from alflb_megatron.lab.training import build, checkpoint
        from alflb_megatron.lab.training.forward_backward import ForwardBackward

        job, shape = plan.job, plan.shape
        self.plan, self.job, self.build, self.checkpoint = plan, job, build, checkpoint
        self.gating = Gating(shape.topk, shape.gate, shape.num_groups, shape.group_topk)
        self.rank_0 = dist.get_rank() == 0
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
        self.run_folder = self._run_folder()
        self.setup = build.setup_model_and_optimizer(plan)
        self.forward_backward = ForwardBackward(plan, self.setup)
        if (saved := self.resumed or self.loaded) is not None:
            checkpoint.load(self.setup, plan, saved, weights_only=self.loaded is not None)
        if job.bias:
            load_bias(self.setup.chunks, initial_biases(job.bias, shape, plan.score_unit), "--bias")
        self.setup.scheduler.step(increment=self.start)
        self.regret: list[dict[str, Any]] | None = None

    def _run_folder(self) -> RunFolder | None:
        """The run folder on rank 0, None on the others; what rank 0 finds wrong with it, every rank raises."""
        run_folder: RunFolder | None = None
        refused: list[tuple[str, str, str] | None] = [None]
        if self.rank_0:
            try:
                run_folder = RunFolder(self.folder, resume_step=self.start or None)
                # Scores of another run, or of steps that are trained anew, must not be taken for this one's.
                remove_recorded_scores(self.folder, after=0 if self.job.record_scores else self.start)
            except SettingError as error:
                refused = [(error.flag, str(error.value), error.allowed)]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise SettingError(*refused[0])
        return run_folder

    def _warm_start(self, progress: Any) -> None:
        """Calibrates the biases on the first global batches; says what came of it."""
        from alflb_megatron.calibration import warm_start

        batches = self.job.warm_start

        def forward() -> None:
            for step in range(batches):
                self.forward_backward(self._batches(self.training, step), forward_only=True)

        with self.forward_backward.evaluating():
            done = warm_start(self.setup.balancer, forward)
        rows = self._over_stages(list(zip(done.before.tolist(), done.after.tolist(), strict=True)))
        before, after = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
        progress.note(f"warm start on {batches} global batches: MaxVio {before:.2f} before, {after:.2f} on them after")

    def run(self) -> dict[str, Any]:
        """Trains and validates; the summary on rank 0, {} on the others."""
        implementations = self.build.implementations()
        if self.run_folder is not None:
            settings = self.plan.as_dict()
            shape = self.plan.shape
            parameters = {"total": shape.parameters(), "active": shape.parameters(active_only=True)}
            self.run_folder.write_config(settings, settings["alflb"] or {}, implementations, parameters)
        with Progress(self.job.steps, start=self.start) if self.rank_0 else SilentProgress() as progress:
            if self.rank_0:
                progress.note("; ".join(f"{name}: {value}" for name, value in implementations.items()))
                progress.note(f"text: {self.training.description}")
            if self.job.warm_start and self.resumed is None:
                self._warm_start(progress)
            saved = self._train(progress)
            validation = self.validate()
        return self._summary(validation, saved)

    # -- training ---------------------------------------------------------------------------------------------------

    def _train(self, progress: Any) -> Path | None:
        saved = self.resumed.path if self.resumed is not None and self.start == self.job.steps else None
        score_recorder = self._score_recorder() if self.job.record_scores else None
        sampler = self._certificate_sampler() if self.job.certify else None
        for step in range(self.start + 1, self.job.steps + 1):
            began = time.perf_counter()
            if sampler is not None:
                sampler.begin_step(step)
            of_this_stage = self._step(step)
            if score_recorder is not None:
                score_recorder.write(step)
            record = self._gather_metrics(of_this_stage)
            seconds = time.perf_counter() - began
            if sampler is not None and step % self.job.certify == 0:
                record["certificates"] = self._certificates(sampler, progress, step)
            if self.job.eval_interval and step % self.job.eval_interval == 0:
                record["validation"] = self.validate()
            if self.run_folder is not None:
                record |= {"seconds": seconds, "tokens_per_second": record["tokens"] / seconds}
                self.run_folder.append(record)
                progress.step(record)
                if record["rejected"]:
                    layers = ", ".join(map(str, record["rejected"]))
                    progress.note(f"step {step}: scores that are NaN or infinite; the bias of layer {layers} stays")
                for line in record.get("alarms", ()):
                    progress.note(f"step {step}: {line}")
            every = self.job.save_every
            if self.job.save and (step == self.job.steps or (every and step % every == 0)):
                saved = self.checkpoint.save(
                    self.setup, self.plan, step, self.folder / "checkpoints", self.training.fingerprint
                )
        if sampler is not None:
            self.regret = sorted(self._over_stages(sampler.regret()), key=lambda row: row["layer"])
        return saved

    def _score_recorder(self) -> ScoreRecorder:
        balancer = self.setup.balancer
        return ScoreRecorder(
            self.folder,
            dict(zip(balancer.layers, balancer.routers, strict=True)),
            self.gating,
            rank=dist.get_rank(),
            ranks=dist.get_world_size(),
            steps=min(self.job.record_scores, self.job.steps - self.start),
            layout=None if self.job.tp > 1 else Layout(self.plan.shape.seq_length, self.job.micro_batch_size),
        )

    def _certificate_sampler(self) -> Any:
        from alflb_megatron.lab.training.certificates import CertificateSampler

        balancer = self.setup.balancer
        # every rank of a pipeline stage holds the same biases: one of them is enough
        routers = dict(zip(balancer.layers, balancer.routers, strict=True)) if self.first_of_stage else {}
        stage = dist.get_rank(self.pp_group)
        return CertificateSampler(routers, self.plan.shape.topk, self.job.certify, self.job.steps, self.folder, stage)

    def _certificates(self, sampler: Any, progress: Any, step: int) -> list[dict[str, Any]]:
        """The certificates of all layers, where they are written; rank 0 says the layer that is farthest off."""
        from alflb_megatron.lab.training.certificates import farthest_off

        rows = sorted(self._over_stages(sampler.finish_step()), key=lambda row: row["layer"])
        if rows:
            progress.note(f"step {step}: {farthest_off(rows)}")
        return rows

    def _step(self, step: int) -> dict[str, Any]:
        """One global batch: forward, backward, update of weights and biases."""
        setup = self.setup
        for chunk in setup.chunks:
            chunk.zero_grad_buffer()
        setup.optimizer.zero_grad()
        loss = self.forward_backward(self._batches(self.training, step - 1), forward_only=False)
        setup.scheduler.step(increment=1)
        updated, grad_norm, _ = setup.optimizer.step()
        shape = self.plan.shape
        return {
            "step": step,
            "loss": loss,
            "lr": setup.scheduler.get_lr(setup.optimizer.param_groups[0]),
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

    # -- what is measured -------------------------------------------------------------------------------------------

    def _gather_metrics(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds the loads and biases of all pipeline stages to a step's record."""
        last = self.setup.balancer.last
        record |= step_metrics(self._over_stages(layer_metrics(last)), self.floor)
        alarms = self._over_stages([] if last is None else list(last.alarms))
        return record | ({"alarms": alarms} if alarms else {})

    def _over_stages(self, rows: list[Any]) -> list[Any]:
        return gather_over_stages(rows, self.pp_group)

    def validate(self) -> dict[str, Any]:
        """The figures of the validation set: loss, loads of each MoE layer (Wang et al. 2024), the sequence floor."""
        batches = (self._batches(self.validation, step) for step in range(self.validation_batches))
        of_stage = self.forward_backward.validate(batches)
        loads = [loads for _, loads in sorted(self._over_stages(of_stage.loads))]
        return validation_metrics(of_stage.loss, loads, self._over_stages(of_stage.sequence_floors))

    def _summary(self, validation: dict[str, Any], saved: Path | None) -> dict[str, Any]:
        if self.run_folder is None:
            return {}
        summary = {
            "rule": self.job.rule,
            **summarise(self.run_folder.records(), validation["sequence_floor"]),
            **validation,
            **({} if self.regret is None else {"regret": self.regret}),
            "checkpoint": None if saved is None else str(saved),
            "run": str(self.folder),
        }
        self.run_folder.write_summary(summary)
        self.run_folder.close()
        return summary
