"""Megatron-Core has to be prepared for a machine without CUDA before any test imports it, whatever their order.

One thread a process, unless the caller says otherwise: the tests' tensors are small, and threads that wait for each
other on busy cores cost many times what they save.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

from alflb_megatron.hosts import cpu

cpu.prepare()
