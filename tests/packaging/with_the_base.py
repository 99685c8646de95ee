"""Run by test_package.py in an environment that holds what the wheel's base asks for, and nothing else.

Imports, both ways to turn ALF-LB on, every host module up to its host, real training steps, checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import alflb_megatron
from alflb_megatron.hosts import cpu


def hosts() -> None:
    """Every module of the hosts is imported, or says which host is missing."""
    folder = Path(alflb_megatron.__file__).parent / "hosts"
    paths = [
        path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py") if not path.stem.startswith("__")
    ]
    names = sorted(".".join(("alflb_megatron.hosts", *path.parts)) for path in paths)
    needs = {"bridge": "megatron.bridge", "nemo": "nemo"}
    for name in names:
        host = needs.get(name.rpartition(".")[2])
        try:
            importlib.import_module(name)
        except ImportError as error:
            assert host is not None and host in f"{error.name} {error}", (name, error)
        else:
            assert host is None, f"{name} was imported without {host}"


def train(example: Path) -> None:
    """The example of the README: a whole training loop of Megatron-Core, explicitly and by the one line."""
    text = example.read_text(encoding="utf-8").replace(
        "STEPS, SEQUENCE, VOCABULARY = 30,", "STEPS, SEQUENCE, VOCABULARY = 5,"
    )
    for mode in ("explicit", "enable"):
        sys.argv = [str(example), "--mode", mode]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(text, str(example), "exec"), {"__name__": "__main__"})
        assert said.getvalue().startswith("step 5  loss "), said.getvalue()
    alflb_megatron.disable()


def checkpoint() -> None:
    """A router's state through Megatron-Core's dist_checkpointing, and a checkpoint that lacks it."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from alflb_megatron.hosts.absent_state import absent_state_allowed

    os.environ["MASTER_PORT"] = "29556"
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_router_score_function="sigmoid", moe_router_load_balancing_type="none", add_bias_linear=False,
        pipeline_dtype=torch.float32, **cpu.SWITCHES,
    )  # fmt: skip
    plain = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    ours = alflb_megatron.with_alflb(plain, alflb_megatron.ALFConfig())
    models = [GPTModel(config, spec, 64, 32, position_embedding_type="rope") for spec in (plain, ours, ours)]
    theirs, first, second = models
    (router,) = (module for module in first.modules() if hasattr(module, "load_counter"))
    router.expert_bias.copy_(torch.tensor([0.5, -0.5, 0.25, -0.25]))
    for saved, loaded in ((first, second), (theirs, first)):
        with tempfile.TemporaryDirectory() as folder, absent_state_allowed():
            dist_checkpointing.save(saved.sharded_state_dict(), folder)
            loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), folder))
    (restored,) = (module for module in second.modules() if hasattr(module, "load_counter"))
    assert torch.equal(restored.expert_bias, torch.tensor([0.5, -0.5, 0.25, -0.25]))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    cpu.prepare()
    hosts()
    train(Path(sys.argv[1]))
    checkpoint()
    from alflb_megatron.lab.cli import COMMANDS  # it can be asked which commands there are

    assert not {"scipy", "matplotlib", "jinja2", "rich", "tqdm", "yaml"} & sys.modules.keys()
    print("the base is enough;", len(COMMANDS), "commands")
