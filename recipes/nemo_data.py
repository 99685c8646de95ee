"""The data of the NeMo recipes: made up, so that nothing is downloaded, or a Megatron .bin/.idx pair."""

from typing import Any

import nemo_run as run
import torch

import alflb_megatron.hosts.nemo  # noqa: F401  (first: without CUDA it makes NeMo runnable)

from nemo import lightning as nl  # isort: skip
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer  # isort: skip
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer  # isort: skip
from nemo.collections.llm.gpt.data.mock import MockDataModule, _MockGPTDataset  # isort: skip
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule  # isort: skip


@nl.io.track_io
class Tokens(NullTokenizer):
    """NeMo's null tokenizer for a vocabulary of `size`, in a form that checkpoints can record."""

    def __init__(self, size: int) -> None:
        super().__init__(size - 1)  # it counts an end-of-document token on top


class MockData(MockDataModule):
    """NeMo's mock data, which here hold an attention mask where one is needed, and go on where they were at a resume.

    Upstream hands `create_attention_mask` to a parameter `seed` and keeps no account of the samples consumed
    (collections/llm/gpt/data/mock.py:MockDataModule.setup).
    """

    init_global_step = 0
    dataset: type = _MockGPTDataset

    def setup(self, stage: str = "") -> None:
        mask = self.create_attention_mask
        for name, split, samples in (
            ("_train_ds", "train", self.num_train_samples),
            ("_validation_ds", "valid", self.num_val_samples),
            ("_test_ds", "test", self.num_test_samples),
        ):
            data = self.dataset(self.tokenizer, split, samples, self.seq_length, create_attention_mask=mask)
            setattr(self, name, data)

    def train_dataloader(self) -> Any:
        self.init_global_step = self.data_sampler.init_global_step = self.trainer.global_step
        return super().train_dataloader()

    state_dict = PreTrainingDataModule.state_dict
    load_state_dict = PreTrainingDataModule.load_state_dict


class Walk(_MockGPTDataset):
    """Tokens that walk round the vocabulary by small random strides, so that there is something to learn.

    Upstream's are noise: a model that trains on it ends up with the same hidden state for every token, and then no bias
    can spread the load.
    """

    STRIDES = 8

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + int(idx))
        strides = torch.randint(1, 1 + self.STRIDES, (self.seq_length + 1,), generator=generator)
        start = torch.randint(self.vocab_size, (1,), generator=generator)
        tokens = (start + strides.cumsum(0)) % self.vocab_size
        return {**super().__getitem__(idx), "tokens": tokens[:-1], "labels": tokens[1:]}


class WalkData(MockData):
    """The recipes' data: mock data of `Walk`."""

    dataset = Walk


def data_of(
    path: str | None,
    tokenizer: str | None,
    *,
    vocab_size: int,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    steps: int,
) -> run.Config[Any]:
    """The data module: of the pair that `path` is the prefix of, else `WalkData`.

    `tokenizer` is one of Hugging Face, by name or folder; without it `Tokens` does nothing.
    """
    common = {
        "seq_length": seq_length,
        "tokenizer": run.Config(AutoTokenizer, tokenizer) if tokenizer else run.Config(Tokens, size=vocab_size),
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
    }
    if path:  # as many samples as the trainer asks for
        return run.Config(PreTrainingDataModule, paths=path, **common)
    samples = {"num_train_samples": steps * global_batch_size, "num_val_samples": 100 * global_batch_size}
    return run.Config(WalkData, **common, **samples)
