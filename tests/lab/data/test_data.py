"""The data of `alflb train`: real text and a real indexed dataset, their order, their split, their refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from alflb_megatron.lab.data import TextData, collate, micro_batches, open_data
from alflb_megatron.settings import SettingError
from tests.distributed import ranks

S = 16
LOW_NAMES = ("low29", "low31")


def opened(source: str | Path, **changes):
    settings = {"tokenizer": "byte", "seq_length": S, "vocab_size": 256, "seed": 7}
    return open_data(str(source), **{**settings, **changes})


def window(data: TextData, index: int) -> bytes:
    """Tokens and last label of a sample, as S + 1 bytes."""
    tokens, labels, _ = data.sample(index)
    assert torch.equal(tokens[1:], labels[:-1])
    return bytes([*tokens.tolist(), int(labels[-1])])


def windows(data: TextData, epoch: int = 0) -> list[bytes]:
    return [window(data, epoch * len(data) + i) for i in range(len(data))]


def cut(text: bytes, length: int = S) -> list[bytes]:
    """The windows that a text must give: length + 1 bytes, stride length, none that is short."""
    return [text[i : i + length + 1] for i in range(0, len(text) - length, length)]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A file whose windows all differ: 200 of them in training, 10 in validation."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i:08d}" for i in range(422)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """120 text files in nested folders, each of 100 bytes or more with a name that no other holds."""
    root = tmp_path / "texts"
    for i in range(120):
        file = root / f"part{i % 7}" / f"text_{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<{i}>é" * (25 + i % 5))
    return root


# ---------------------------------------------------------------------------------------------------- real sources


def test_stdlib_is_the_library_split_by_file():
    root = Path(sysconfig.get_path("stdlib"))
    out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if out.isdisjoint(name.parts) and not any(p.startswith(("config-", "_sysconfigdata")) for p in name.parts):
            text = path.read_bytes()
            text.decode()
            if text:
                hash_ = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest())
                parts[hash_ < 2**256 * 0.05].append(text)
    train, validation = open_data("stdlib", seq_length=2048, vocab_size=300, seed=1)
    assert len(parts[True]) > 10 and len(parts[False]) > 200
    assert Counter(windows(train)) == Counter(cut(b"\0".join(parts[False]), 2048))
    assert windows(validation) == cut(b"\0".join(parts[True]), 2048)
    assert (
        f"{len(parts[True]) + len(parts[False])} files, {len(parts[True])} of them for validation" in train.description
    )


def test_an_installed_package_is_a_text_of_its_version():
    sizes = {"seq_length": 256, "vocab_size": 256, "seed": 1}
    found, same = (open_data(f"package:numpy{v}", **sizes)[0] for v in ("", f"=={np.__version__}"))
    assert found.fingerprint == same.fingerprint
    root, out = Path(np.__file__).parent, {"test", "tests", "__pycache__"}
    files = [path for path in root.rglob("*.py") if out.isdisjoint(path.relative_to(root).parts)]
    count = sum(path.stat().st_size > 0 for path in files)
    assert found.description.startswith(f"training text of numpy {np.__version__} ({count} files, ")
    with pytest.raises(SettingError, match=f"numpy {np.__version__} is installed, which is another text"):
        open_data("package:numpy==0.1", seq_length=256, vocab_size=256, seed=1)
    for name in ("nothing_of_this_name", "sys", "a/b", ""):
        with pytest.raises(SettingError, match="no such package is installed: must be stdlib, package:NAME"):
            open_data(f"package:{name}", seq_length=256, vocab_size=256, seed=1)


def test_folder_is_split_by_file_and_says_what_it_left_out(folder: Path):
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "late_zero.txt").write_bytes(b"text " * 2000 + b"\0")
    (folder / "latin1.txt").write_bytes("é".encode("latin-1") * 100)
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("hidden " * 50)
    train, validation = opened(folder)
    texts = {False: [], True: []}
    for path in sorted(folder.glob("part*/*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix().encode()
        texts[int.from_bytes(hashlib.sha256(name).digest()) < 2**256 * 0.05].append(path.read_bytes())
    assert 1 <= len(texts[True]) <= 20
    assert Counter(windows(train)) == Counter(cut(b"\0".join(texts[False])))
    assert windows(validation) == cut(b"\0".join(texts[True]))
    assert "120 files" in train.description and "3 left out as not UTF-8 text" in train.description


@pytest.mark.parametrize("names", [("few0", "few1"), ("few0", "few1", "few2", "few3"), LOW_NAMES])
def test_few_files_still_split_by_file(tmp_path: Path, names: tuple[str, ...]):
    """Names whose hashes all lie above the share of validation, or all below it."""
    below = {int.from_bytes(hashlib.sha256(f"{name}.txt".encode()).digest()) < 2**256 * 0.05 for name in names}
    assert below == {names == LOW_NAMES}
    for i, name in enumerate(names):
        (tmp_path / f"{name}.txt").write_text(chr(97 + i) * 100)
    train, validation = opened(tmp_path)
    seen = [{byte for text in windows(data) for byte in text} - {0} for data in (train, validation)]
    assert seen[0].isdisjoint(seen[1]) and len(seen[0] | seen[1]) == len(names)
    assert len(seen[1]) == 1


@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_single_file_keeps_its_end_for_validation(numbered: Path, inside_a_folder: bool):
    text = numbered.read_bytes()
    train, validation = opened(numbered.parent if inside_a_folder else numbered)
    end = len(text) - round(len(text) * 0.05)
    assert Counter(windows(train)) == Counter(cut(text[:end]))
    assert windows(validation) == cut(text[end:])


def test_every_length_gives_all_its_whole_windows(tmp_path: Path):
    for length in range(341, 341 + 3 * S):
        text = bytes(33 + i % 90 for i in range(length))
        (tmp_path / "text.txt").write_bytes(text)
        end = length - round(length * 0.05)
        train, validation = opened(tmp_path / "text.txt")
        assert Counter(windows(train)) == Counter(cut(text[:end])) and windows(validation) == cut(text[end:])


# ----------------------------------------------------------------------------------------------- order and batches


def test_order_is_pinned(numbered: Path):
    """These numbers hold on every platform and NumPy version; if they change, running jobs cannot be resumed."""
    train, _ = opened(numbered)
    found = [[int(window(train, epoch * len(train) + i)[:8]) // 2 for i in range(6)] for epoch in (0, 1)]
    assert found == [[34, 37, 8, 76, 138, 124], [70, 28, 189, 180, 75, 166]]


def test_order_depends_on_the_seed_and_on_nothing_else(numbered: Path):
    first, _ = opened(numbered, train_samples=10)
    again, _ = opened(numbered, train_samples=10**6, vocab_size=50000)
    other, other_validation = opened(numbered, seed=8)
    assert windows(first) == windows(again)
    assert windows(first) != windows(other) and Counter(windows(first)) == Counter(windows(other))
    assert windows(opened(numbered)[1]) == windows(other_validation)


def test_epochs(numbered: Path):
    train, validation = opened(numbered)
    first, second, third = (windows(train, epoch) for epoch in range(3))
    assert len({*map(tuple, (first, second, third))}) == 3
    assert sorted(first) == sorted(second) == sorted(third)
    # Epoch 1 of one seed is not epoch 0 of the next.
    assert second != windows(opened(numbered, seed=8)[0])
    assert windows(validation, 0) == windows(validation, 5) == cut(numbered.read_bytes()[-169:])
    with pytest.raises(IndexError):
        train.sample(-1)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_global_batch_does_not_depend_on_the_split(numbered: Path, dp_size: int, micro_batch_size: int):
    train, _ = opened(numbered)
    size, steps = 8, 60  # 480 samples: past two ends of an epoch
    assert len(train) == 200
    for step in range(steps):
        dealt = {}
        for rank in range(dp_size):
            batches = list(
                micro_batches(
                    train,
                    step=step,
                    global_batch_size=size,
                    micro_batch_size=micro_batch_size,
                    dp_rank=rank,
                    dp_size=dp_size,
                )
            )
            assert len(batches) == size // micro_batch_size // dp_size
            for m, batch in enumerate(batches):
                assert batch.tokens.shape == (micro_batch_size, S)
                for row in range(micro_batch_size):
                    place = (m * dp_size + rank) * micro_batch_size + row  # Megatron-LM's deal
                    dealt[place] = bytes([*batch.tokens[row].tolist(), int(batch.labels[row, -1])])
        assert [dealt[place] for place in range(size)] == [window(train, step * size + i) for i in range(size)]


def test_batch_has_the_tensors_that_a_gpt_model_takes(numbered: Path):
    batch = collate(opened(numbered)[0], [3, 1, 2]).to("cpu")
    for tensor, dtype in (
        (batch.tokens, torch.int64),
        (batch.labels, torch.int64),
        (batch.loss_mask, torch.float32),
        (batch.position_ids, torch.int64),
    ):
        assert tensor.dtype == dtype and tensor.shape == (3, S) and tensor.is_contiguous()
    assert torch.equal(batch.position_ids[2], torch.arange(S)) and bool((batch.loss_mask == 1).all())


def test_global_batch_that_does_not_divide(numbered: Path):
    with pytest.raises(SettingError, match=r"--global-batch-size=10: .*--micro-batch-size=2 .* size 4"):
        micro_batches(opened(numbered)[0], step=0, global_batch_size=10, micro_batch_size=2, dp_rank=0, dp_size=4)
    with pytest.raises(ValueError, match="rank 4 of 4"):
        micro_batches(opened(numbered)[0], step=0, global_batch_size=8, micro_batch_size=2, dp_rank=4, dp_size=4)


def test_fingerprint_follows_content_and_order_not_place(folder: Path, tmp_path: Path):
    train, validation = opened(folder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert opened(copy)[0].fingerprint == opened(folder, train_samples=5, vocab_size=999)[0].fingerprint
    prints = {train.fingerprint, validation.fingerprint}
    for changes in ({"seed": 8}, {"seq_length": S + 1}):
        prints.add(opened(folder, **changes)[0].fingerprint)
    assert opened(folder, seed=8)[1].fingerprint == validation.fingerprint  # whose order has no seed
    (copy / "part0" / "text_0.txt").write_text("<0>è" * 25)
    prints.add(opened(copy)[0].fingerprint)
    assert len(prints) == 5 and all(len(text) == 64 for text in prints)


def test_description_says_how_often_the_data_is_read(numbered: Path):
    train, validation = opened(numbered, train_samples=500, validation_samples=5)
    assert train.description.endswith("200 samples, read 2.5 times")
    assert validation.description.endswith(f"{len(validation)} samples, read {5 / len(validation):.3g} times")
    assert "read" not in opened(numbered)[0].description.rsplit(",", 1)[1]


# -------------------------------------------------------------------------------------------------- indexed dataset


def write_indexed(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def token_documents(count: int = 40) -> list[list[int]]:
    """Document i holds the token i alone, some 30 times."""
    return [[i] * (25 + i % 11) for i in range(count)]


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    return write_indexed(tmp_path / "corpus", token_documents())


def test_indexed_holds_the_last_documents_for_validation(indexed: Path, tmp_path: Path):
    train, validation = opened(indexed, cache_dir=tmp_path / "cache")
    assert {byte for text in windows(train) for byte in text} == set(range(38))
    assert {byte for text in windows(validation) for byte in text} == {38, 39}
    assert len(train) == (sum(map(len, token_documents()[:38])) - 1) // S
    assert not (tmp_path / "corpus").exists()  # the cache was asked for elsewhere


def test_indexed_has_megatron_order_in_its_first_epoch_and_others_later(indexed: Path, tmp_path: Path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=S,
        blend=([str(indexed)], None),
        split="95,5,0",
        tokenizer=MegatronTokenizer.from_pretrained(metadata_path={"library": "byte-level"}, _pad_id=-1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(tmp_path / "theirs"),
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [50, 2, 0], lambda: True, config).build()[0]
    train, validation = opened(indexed, cache_dir=tmp_path / "ours")
    for i in range(50):
        assert torch.equal(train.sample(i).tokens, theirs[i]["tokens"])
        assert torch.equal(train.sample(i).labels, theirs[i]["labels"])
    first, second, third = (windows(train, epoch) for epoch in range(3))
    assert sorted(first) == sorted(second) == sorted(third) and len({*map(tuple, (first, second, third))}) == 3
    assert windows(validation) == windows(validation, 1)
    other, other_validation = opened(indexed, seed=8, cache_dir=tmp_path / "ours")
    assert windows(other) != first and windows(other_validation) == windows(validation)
    assert other.fingerprint != train.fingerprint and other_validation.fingerprint == validation.fingerprint


def test_indexed_rewritten_under_its_name_is_not_read_by_the_old_index(indexed: Path):
    before = opened(indexed)[0]
    for path in (indexed.with_suffix(".bin"), indexed.with_suffix(".idx")):
        path.unlink()
    write_indexed(indexed, [[99] * 60 for _ in token_documents()])
    after = opened(indexed)[0]
    assert {byte for text in windows(after) for byte in text} == {99} and len(after) == (38 * 60 - 1) // S
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_indexed_names_and_types(tmp_path: Path, ending: str, dtype: type):
    prefix = write_indexed(tmp_path / "data.v1", [[40_000 + i] * 30 for i in range(20)], dtype)
    train, _ = opened(f"{prefix}{ending}", tokenizer="null:40020", vocab_size=40_020)
    batch = collate(train, range(len(train)))
    assert set(batch.tokens.flatten().tolist()) <= set(range(40_000, 40_019))
    assert bool((batch.loss_mask == 1).all())


def seen(prefix: Path, cache: Path) -> list[tuple[str, list[list[int]]]]:
    """Fingerprint and tokens of two epochs of each split."""
    splits = opened(prefix, cache_dir=cache)
    return [(data.fingerprint, [data.sample(i).tokens.tolist() for i in range(2 * len(data))]) for data in splits]


def test_indexed_is_the_same_on_two_ranks(indexed: Path, tmp_path: Path):
    first, second = ranks.run(2, seen, indexed, tmp_path / "cache")
    assert first == second == seen(indexed, tmp_path / "alone")


def test_sentencepiece_tokenizer_is_loaded_or_its_package_named(indexed: Path, tmp_path: Path):
    spec = f"sentencepiece:{tmp_path / 'words.model'}"
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(SettingError, match=r"--tokenizer=sentencepiece.*needs the Python package sentencepiece"):
            opened(indexed, tokenizer=spec)
        return
    import sentencepiece

    with pytest.raises(SettingError, match=r"--tokenizer=sentencepiece.*cannot build it"):
        opened(indexed, tokenizer=spec)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "words"), vocab_size=60)
    assert len(opened(indexed, tokenizer=spec, vocab_size=60)[0]) > 0
    with pytest.raises(SettingError, match="60 tokens need a --vocab-size of 60"):
        opened(indexed, tokenizer=spec, vocab_size=59)


def test_huggingface_tokenizer_is_loaded_or_its_package_named(tmp_path: Path):
    indexed = write_indexed(tmp_path / "padded", [[2 + i] * 30 + [1] * 3 for i in range(20)])
    spec = f"huggingface:{tmp_path / 'words'}"
    if importlib.util.find_spec("transformers") is None:
        with pytest.raises(SettingError, match=r"--tokenizer=huggingface.*needs the Python package transformers"):
            opened(indexed, tokenizer=spec)
        return
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(SettingError, match=r"--tokenizer=huggingface.*cannot build it"):
        opened(indexed, tokenizer=spec)
    words = {"</s>": 0, "<pad>": 1, "<unk>": 2, **{f"word{i}": i for i in range(3, 30)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "words")
    train, _ = opened(indexed, tokenizer=spec, vocab_size=30)
    # GPTDataset turns padding labels into token 0 and masks them: in each sample its own, none from the first one.
    samples = [train.sample(i) for i in range(len(train))]
    assert all(torch.equal(sample.loss_mask == 0, sample.labels == 0) for sample in samples)
    assert len({tuple(sample.loss_mask.tolist()) for sample in samples}) > 1


# ------------------------------------------------------------------------------------------------------- bad input


def indexed_with(tmp_path: Path, *, idx=lambda content: content, bin_=lambda content: content, documents=None) -> Path:
    prefix = write_indexed(tmp_path / "bad", token_documents() if documents is None else documents)
    for ending, change in ((".idx", idx), (".bin", bin_)):
        path = prefix.with_suffix(ending)
        content = change(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return prefix


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


BAD_INPUT = {
    "missing path": ("--data", lambda t: t / "nowhere", {}, "no such file or folder"),
    "empty name": ("--data", lambda t: "", {}, "must be stdlib"),
    "empty folder": ("--data", lambda t: t, {}, "no UTF-8 text file"),
    "folder without text": ("--data", lambda t: written(t / "a.png", b"\x89\0").parent, {}, "1 left out as not UTF-8"),
    "binary file": ("--data", lambda t: written(t / "a.bin", b"a\0b" * 99), {}, "not UTF-8 text"),
    "latin-1 file": ("--data", lambda t: written(t / "a.txt", b"caf\xe9 " * 99), {}, "not UTF-8 text"),
    "empty file": ("--data", lambda t: written(t / "a.txt", b""), {}, "0 bytes"),
    "short text": ("--data", lambda t: written(t / "a.txt", b"ab"), {}, "training part has 2 bytes"),
    "short validation": ("--data", lambda t: written(t / "a.txt", b"ab" * 99), {}, "validation part has 10 bytes"),
    "not a file": ("--data", lambda t: "/dev/null", {}, "not UTF-8 text"),
    "no .bin": ("--data", lambda t: indexed_with(t, bin_=lambda c: None), {}, "bad.bin is missing"),
    "no .idx": ("--data", lambda t: indexed_with(t, idx=lambda c: None), {}, "bad.idx is missing"),
    ".idx of noise": ("--data", lambda t: indexed_with(t, idx=lambda c: b"noise" * 99), {}, "not an index file"),
    "empty .idx": ("--data", lambda t: indexed_with(t, idx=lambda c: b""), {}, "not an index file"),
    ".idx cut off": ("--data", lambda t: indexed_with(t, idx=lambda c: c[:-9]), {}, "cut off"),
    ".idx of floats": (
        "--data",
        lambda t: indexed_with(t, idx=lambda c: c[:17] + b"\x07" + c[18:]),
        {},
        "no integer type",
    ),
    ".idx with wrong bounds": (
        "--data",
        lambda t: indexed_with(t, idx=lambda c: c[:-8] + b"\x09" + c[-7:]),
        {},
        "document bounds",
    ),
    ".bin cut off": ("--data", lambda t: indexed_with(t, bin_=lambda c: c[:-1]), {}, "bytes of bad.bin"),
    "empty .bin": ("--data", lambda t: indexed_with(t, bin_=lambda c: b""), {}, "which has 0"),
    "one document": ("--data", lambda t: indexed_with(t, documents=[[1] * 999]), {}, "fewer than 2 sequences"),
    "few tokens": ("--data", lambda t: indexed_with(t, documents=[[1] * 16] * 3), {}, "validation part has 16 tokens"),
    "cache is a file": (
        "--data",
        indexed_with,
        {"cache_dir": Path(__file__)},
        "no folder for its index",
    ),
    "unknown tokenizer": ("--tokenizer", indexed_with, {"tokenizer": "gpt2"}, "must be byte, null:"),
    "unknown tokenizer with text": ("--tokenizer", lambda t: "stdlib", {"tokenizer": "bytes"}, "must be byte, null:"),
    "byte with a name": ("--tokenizer", indexed_with, {"tokenizer": "byte:256"}, "must be byte, null:"),
    "null without size": ("--tokenizer", indexed_with, {"tokenizer": "null:many"}, "must be byte, null:"),
    "sentencepiece without path": ("--tokenizer", indexed_with, {"tokenizer": "sentencepiece:"}, "sentencepiece:PATH"),
    "tokenizer with text": ("--tokenizer", lambda t: "stdlib", {"tokenizer": "null:256"}, "byte by byte"),
    "small model, text": (
        "--tokenizer",
        lambda t: "stdlib",
        {"vocab_size": 255},
        "--vocab-size of 256 or more, not 255",
    ),
    "small model, indexed": (
        "--tokenizer",
        indexed_with,
        {"tokenizer": "null:301"},
        "--vocab-size of 301 or more, not 256",
    ),
    "small tokenizer": ("--tokenizer", indexed_with, {"tokenizer": "null:2"}, "must be the one the data was made with"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, case: str):
    flag, make, changes, expected = BAD_INPUT[case]
    source = make(tmp_path)
    with pytest.raises(SettingError) as caught:
        opened(source, **changes)
    error = caught.value
    assert error.flag == flag
    assert error.value == (str(source) if flag == "--data" else changes.get("tokenizer", "byte"))
    assert expected in str(error) and "\n" not in str(error)


def test_tokens_beyond_the_tokenizer_are_refused_wherever_they_lie(tmp_path: Path):
    """One token that the tokenizer lacks: the sample that holds it is refused, not given to the embedding."""
    prefix = write_indexed(tmp_path / "one", [[3] * 30] * 30 + [[3] * 20 + [300] + [3] * 20] + [[3] * 30] * 30)
    with pytest.raises(SettingError, match=r"--tokenizer=byte: .* holds token 300, it has 256"):
        windows(opened(prefix)[0])
