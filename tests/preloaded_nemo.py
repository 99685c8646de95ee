"""As `tests/preloaded.py`, for the tests of NeMo 2: NeMo is imported, and of ours `hosts/cpu` alone.

Nothing is substituted for CUDA yet.
"""

import gc

import torch

from alflb_megatron.hosts import cpu
from alflb_megatron.hosts.cpu import trainers

trainers.prepare_nemo(skip={one.name for one in (*cpu.SUBSTITUTIONS, *trainers.COMMON, *trainers.NEMO)})
torch.set_num_threads(1)

import nemo.collections.llm  # noqa: E402, F401
import nemo_run  # noqa: E402, F401

gc.collect()
gc.freeze()
