"""One process, one rank, NCCL: the groups of Megatron-Core over the device of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    from megatron.core import jit

    jit.disable_jit_fuser()  # before what it compiles is imported: that takes longer than all the tests together


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from alflb_megatron.lab.training import launch

    launch.as_single_rank()
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def groups(one_rank: None) -> Iterator[None]:
    from tests.distributed.ranks import model_parallel

    with model_parallel():
        yield
