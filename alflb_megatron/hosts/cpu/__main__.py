"""Runs a script of Megatron-LM without CUDA: `torchrun ... -m alflb_megatron.hosts.cpu PATH/TO/pretrain_gpt.py ...`.

Give the script `--distributed-backend gloo --transformer-impl local` and switch its CUDA fusions off; docs/hosts.md has
a command that works. Where CUDA is there, the script runs as it would by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alflb_megatron.hosts.cpu.trainers import prepare_megatron_lm
from alflb_megatron.hosts.dataset_helpers import compile_for_this_python

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    sys.exit("usage: torchrun ... -m alflb_megatron.hosts.cpu PATH/TO/pretrain_gpt.py [ARGUMENT...]")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
prepare_megatron_lm()
compile_for_this_python()
# Not by runpy.run_path: the processes that Megatron-LM spawns to write checkpoints would import the script again,
# unprepared. As it is they find this module to be the main one, and leave it alone.
__file__ = sys.argv[0]
exec(compile(Path(__file__).read_bytes(), __file__, "exec", dont_inherit=True))
