"""Trainings of a tiny MoE by NeMo's own `llm.train`, as one rank of them: `torchrun ... -m tests.hosts.nemo_job JSON`.

The JSON is a list of jobs, each run in a process of its own, forked once NeMo is imported. A job names `folder`,
`steps`, `ep`, `port` and, where they apply: `callback`, the knobs of ALFLB; `late`, whether it is added only after the
model was built; `imported`, whether our package is imported without being used; `builtin`, the rate of NeMo's own
expert bias; `save`, whether to write checkpoints; `resume`, where one lies; `fails`, whether an error is expected.
"""

from __future__ import annotations

import csv
import functools
import glob
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from alflb_megatron.hosts.cpu.trainers import prepare_nemo


def adapt_nemo() -> None:
    """What `hosts/nemo.py` does so that NeMo 2.7.3 runs on Megatron-Core 0.16, for runs that must not import it."""
    optimizer = importlib.import_module("megatron.core.optimizer")
    plain = optimizer.get_megatron_optimizer
    known = inspect.signature(plain).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{name: value for name, value in kwargs.items() if name in known})

    optimizer.get_megatron_optimizer = call


class Late(pl.Callback):
    """Adds a callback when the model has been built."""

    def __init__(self, callback: pl.Callback) -> None:
        self.callback = callback

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.callbacks.append(self.callback)


def train(job: dict[str, Any]) -> None:
    """Trains, and leaves `losses.json` and the biases in the job's folder."""
    import nemo.collections.llm as llm
    import nemo.lightning as nl
    from lightning.pytorch.loggers import CSVLogger
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
    from nemo.collections.llm.gpt.data import mock

    callbacks: list[Any] = []
    if job.get("imported") or "callback" in job:
        data_module = importlib.import_module("alflb_megatron.recipes.nemo_data").MockData
    else:
        data_module = mock.MockDataModule
        dataset = mock._MockGPTDataset
        mock._MockGPTDataset = lambda tok, name, n, seq, mask: dataset(tok, name, n, seq, create_attention_mask=mask)
    if "callback" in job:
        ours = importlib.import_module("alflb_megatron.hosts.nemo").ALFLB(**job["callback"])
        callbacks.append(Late(ours) if job.get("late") else ours)
    if "callback" not in job or job.get("late"):
        adapt_nemo()

    nl.io.track_io(NullTokenizer)  # else checkpoints cannot record it
    tokenizer = NullTokenizer(127)
    config = llm.GPTConfig(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        seq_length=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        num_moe_experts=8,
        moe_ffn_hidden_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_router_topk=2,
        moe_layer_freq=[0, 1, 1],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias="builtin" in job,
        moe_router_bias_update_rate=job.get("builtin", 1e-3),
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_layer_spec=functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=False),
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    model = llm.GPTModel(config, tokenizer=tokenizer)
    data = data_module(
        seq_length=64,
        tokenizer=tokenizer,
        micro_batch_size=2,
        global_batch_size=8,
        num_train_samples=800,
        num_workers=0,
        pin_memory=False,
        create_attention_mask=True,
    )
    folder = Path(job["folder"])
    metrics = CSVLogger(folder / "csv", name="", version="", flush_logs_every_n_steps=1)
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=job["ep"],
        num_nodes=1,
        max_steps=job["steps"],
        strategy=nl.MegatronStrategy(
            expert_model_parallel_size=job["ep"],
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=False),
            process_group_backend="gloo",
            ckpt_async_save=False,
        ),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=bool(job.get("save") or "resume" in job),
        use_distributed_sampler=False,
    )
    save = nl.ModelCheckpoint(every_n_train_steps=10, save_top_k=-1, monitor="step", filename="{step}")
    log = nl.NeMoLogger(
        log_dir=str(folder), name="run", ckpt=save if job.get("save") else None, extra_loggers=[metrics]
    )
    llm.train(
        model=model,
        data=data,
        trainer=trainer,
        optim=nl.MegatronOptimizerModule(
            config=OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=False)
        ),
        tokenizer="model",
        log=log,
        resume=nl.AutoResume(resume_from_path=glob.glob(job["resume"])[0]) if "resume" in job else None,
    )
    if trainer.global_rank == 0:
        biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")}
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        torch.save({"biases": biases, "weights": weights}, folder / "end.pt")
        with open(folder / "csv" / "metrics.csv", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        (folder / "metrics.json").write_text(json.dumps(rows), encoding="utf-8")
    if not job.get("imported") and "callback" not in job:
        ours = [name for name in sys.modules if name.startswith("alflb_megatron")]
        allowed = {
            "alflb_megatron",
            "alflb_megatron.hosts",
            "alflb_megatron.hosts.cpu",
            "alflb_megatron.hosts.cpu.substitutions",
            "alflb_megatron.hosts.cpu.trainers",
        }
        assert set(ours) == allowed, ours


def alone(job: dict[str, Any]) -> None:
    """Runs a job in a fork; raises SystemExit where it did not end as expected."""
    if (child := os.fork()) == 0:
        os.environ.update(MASTER_PORT=str(job["port"]), TORCHELASTIC_USE_AGENT_STORE="False")
        code = int(bool(job.get("fails")))
        try:
            train(job)
        except BaseException:
            text = traceback.format_exc()
            print(text, flush=True)
            if job.get("fails"):
                Path(job["folder"], "error.txt").write_text(text, encoding="utf-8")
            code = 1 - code
        finally:
            sys.stdout.flush()
            for writer in multiprocessing.active_children():  # of checkpoints; it would outlive us
                writer.kill()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{job['folder']} did not end as expected")


if __name__ == "__main__":
    prepare_nemo()
    importlib.import_module("nemo.collections.llm")
    for each in json.loads(sys.argv[1]):
        alone(each)
