"""A small corpus as Megatron's .bin/.idx pair, and a Hugging Face tokenizer: `python -m tests.recipes.text DIR`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPLIT = "80,10,10"
"""So that none of its documents' parts is empty: Megatron-Core would look for samples in it without end."""


def corpus(folder: Path) -> tuple[str, str]:
    """Prefix of the pair and folder of the tokenizer, made by a process of its own; the names need quoting."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.recipes.text", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return str(folder / "te, xt"), str(folder / "to, ken")


def write(folder: Path) -> None:
    import numpy
    import torch

    from alflb_megatron.hosts import cpu

    cpu.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pair = IndexedDatasetBuilder(str(folder / "te, xt.bin"), dtype=numpy.uint16)
    for document in range(50):
        generator = torch.Generator().manual_seed(document)
        pair.add_document(torch.randint(0, 60, (700,), generator=generator), [700])
    pair.finalize(str(folder / "te, xt.idx"))
    words = {**{f"w{index}": index for index in range(62)}, "<unk>": 62, "</s>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder / "to, ken")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
