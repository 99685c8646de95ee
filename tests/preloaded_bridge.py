"""As `tests/preloaded.py`, for the tests of Megatron-Bridge: Bridge is imported, and of ours `hosts/cpu` alone.

Of what Bridge needs without CUDA only Transformer Engine's name is put in place, for Bridge cannot be imported without.
"""

import gc

import torch

from alflb_megatron.hosts import cpu
from alflb_megatron.hosts.cpu import trainers

_LEFT_OUT = {one.name for one in (*cpu.SUBSTITUTIONS, *trainers.COMMON, *trainers.BRIDGE)} - {"transformer_engine"}
trainers.prepare_bridge(skip=_LEFT_OUT)
torch.set_num_threads(1)

import megatron.bridge.recipes  # noqa: E402
import megatron.bridge.training.pretrain  # noqa: E402, F401

gc.collect()
gc.freeze()
