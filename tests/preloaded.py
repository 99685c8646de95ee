"""What the process that tests are forked from has imported (`tests/forked.py`).

Nothing is substituted for CUDA yet: each fork calls `cpu.prepare` itself, and may leave something out.
"""

import gc

import torch

from alflb_megatron.hosts import cpu

cpu.prepare(skip=[substitution.name for substitution in cpu.SUBSTITUTIONS])
torch.set_num_threads(1)

import megatron.core.dist_checkpointing  # noqa: E402, F401
import pytest  # noqa: E402, F401

import alflb_megatron.calibration  # noqa: E402
import alflb_megatron.hosts.enable  # noqa: E402
import alflb_megatron.hosts.expert_bias  # noqa: E402
import alflb_megatron.hosts.log  # noqa: E402
import alflb_megatron.lab.data  # noqa: E402
import alflb_megatron.lab.training.build  # noqa: E402
import alflb_megatron.lab.training.checkpoint  # noqa: E402
import alflb_megatron.lab.training.train  # noqa: E402, F401

gc.collect()
gc.freeze()  # what is imported stays shared between the forks
