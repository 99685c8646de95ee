"""`alflb data`: real text through datasets and tokenizers to files that Megatron-Core reads; kills and damage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before datasets is imported

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.data import errors, hub, open_data, prepare, shards
from alflb_megatron.lab.data.hub import Hub
from alflb_megatron.lab.data.manifest import damage
from alflb_megatron.lab.data.prepare import Preparation
from alflb_megatron.settings import SettingError
from tests import forked

ALFLB = [sys.executable, "-m", "alflb_megatron.lab.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = ("routers", "choose", "experts", "évenly", "and", "loads", "settle", "\n", "def f(x):", "    return x", "漢字")


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a run changes in this process, and a cache of its own for data sets of the hub."""
    import datasets

    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1" if "NUM" in name else "false")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def text_of(number: int, words: int = 120) -> str:
    chosen = np.random.default_rng(number).integers(len(WORDS), size=words)
    return f"Document {number}. " + " ".join(WORDS[i] for i in chosen)


def folder_of(root: Path, count: int, words: int = 120) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:04d}.txt").write_text(text_of(i, words), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 documents, a file each, the last but one blank."""
    root = folder_of(tmp_path_factory.mktemp("source") / "texts", 50)
    (root / "0048.txt").write_text(" \n")
    return root


def settings(source: Path | str, out: Path | str, **changes: Any) -> Preparation:
    return Preparation(str(source), **{"out": str(out), "tokenizer": "train:300", "shard_documents": 7, **changes})


@pytest.fixture(scope="module")
def made(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`texts`, prepared by one process without a break. Tests that change it take a copy."""
    prefix = tmp_path_factory.mktemp("made") / "corpus.v1"
    manifest, new = prepare.prepare(settings(texts, prefix))
    assert new and manifest["documents"] == 49 and manifest["empty_documents"] == 1
    return prefix


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.parent, tmp_path / "copy")
    return tmp_path / "copy" / made.name


def whole(prefix: Path) -> list[bytes]:
    """All that a preparation leaves, but its manifest."""
    files = [f"{prefix}.bin", f"{prefix}.idx", f"{prefix}-tokenizer/tokenizer.json"]
    assert not Path(f"{prefix}-parts").exists() and Path(f"{prefix}.json").exists()
    return [Path(file).read_bytes() for file in files]


def read(prefix: Path) -> list[list[int]]:
    """The documents in a .bin and .idx, by Megatron-Core's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    assert list(data.document_indices) == list(range(len(data) + 1))
    return [data[i].tolist() for i in range(len(data))]


def require(prefix: Path, documents: list[str]) -> None:
    """`prefix` holds these documents, by its own tokenizer and by the text that its tokens stand for."""
    from tokenizers import Tokenizer

    tokenizer, held = Tokenizer.from_file(f"{prefix}-tokenizer/tokenizer.json"), read(prefix)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert [tokenizer.decode(tokens[:-1], skip_special_tokens=False) for tokens in held] == documents
    tokenizer.encode_special_tokens = True
    assert held == [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in documents]
    assert all(end not in tokens[:-1] for tokens in held)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_folder_becomes_its_documents_in_order(made: Path, texts: Path):
    require(made, [path.read_text() for path in sorted(texts.iterdir()) if path.name != "0048.txt"])
    manifest, found = damage(made)
    held = read(made)
    assert found == [] and manifest["tokens"] == sum(map(len, held)) and manifest["token_type"] == "uint16"
    assert manifest["vocabulary"] == 300 and manifest["settings"]["source"]["files"] == 50


def test_alflb_train_reads_it(made: Path, tmp_path: Path):
    spec = f"huggingface:{made}-tokenizer"
    train, validation = open_data(str(made), tokenizer=spec, seq_length=32, vocab_size=300, seed=7, cache_dir=tmp_path)
    stream = [token for document in read(made) for token in document]
    seen = sorted(token for i in range(len(validation)) for token in validation.sample(i).tokens.tolist())
    assert len(train) > 100 and set(seen) <= set(stream)
    with pytest.raises(SettingError, match="300 tokens need a --vocab-size of 300"):
        open_data(str(made), tokenizer=spec, seq_length=32, vocab_size=299, seed=7, cache_dir=tmp_path)

    small = ["--num-layers", "2", "--hidden-size", "32", "--num-experts", "4", "--topk", "2", "--seq-length", "32"]
    one = ["--nproc", "1", "--ep", "1", "--steps", "2", "--no-save", "--validation-sequences", "16", "--json"]
    data = ["--data", str(made), "--tokenizer", spec, "--vocab-size", "320", "--out", str(tmp_path / "run")]
    done = forked.alflb("train", *small, *one, *data)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_any_number_of_processes_and_any_shards_give_the_same_bytes(made: Path, texts: Path, tmp_path: Path):
    prepare.prepare(settings(texts, tmp_path / "two", workers=2))
    prepare.prepare(settings(texts, tmp_path / "other", shard_documents=1000))
    elsewhere = shutil.copytree(texts, tmp_path / "elsewhere" / "name")
    manifest, _ = prepare.prepare(settings(elsewhere, tmp_path / "copied"))
    assert whole(tmp_path / "two") == whole(made) == whole(tmp_path / "other") == whole(tmp_path / "copied")
    assert manifest == damage(made)[0]


def test_all_kinds_of_files(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    root = tmp_path / "a [1] *"
    (root / "sub").mkdir(parents=True)
    (root / "__init__.py").write_text("x = 1\r\ny = 2\n")
    (root / "README.md").write_text("# A <|endoftext|> in a text is no end of it")
    (root / "sub" / "q?.txt").write_text("third")
    (root / "zero.txt").write_bytes(b"")
    lines = [{"text": "four\u2028in one line", "id": 1}, {"text": None}, {"text": "five", "id": "x", "more": [1]}]
    (root / "a.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    parquet.write_table(pyarrow.table({"text": ["six", None, "seven"], "n": [1, 2, 3]}), root / "b.parquet")
    large = pyarrow.table({"text": pyarrow.array(["eight"], pyarrow.large_string())})
    parquet.write_table(large, root / "c.parquet")
    (root / ".hidden.txt").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    (root / "binary.md").write_bytes(b"text\0text")
    manifest, _ = prepare.prepare(settings(root, tmp_path / "all", shard_documents=2))
    expected = ["# A <|endoftext|> in a text is no end of it", "x = 1\ny = 2\n", "third"]
    require(tmp_path / "all", [*expected, "six", "seven", "eight", "four\u2028in one line", "five"])
    assert manifest["empty_documents"] == 4
    assert manifest["left_out"][0].startswith("1 files with another ending")
    assert manifest["left_out"][1].startswith("2 files were left out as not UTF-8 text, the first of them binary.md")


@pytest.mark.parametrize(
    ("unit", "documents"),
    [("file", ["a\nb\n\nc\n"]), ("paragraph", ["a\nb", "c\n"]), ("line", ["a", "b", "c"])],
)
def test_documents_of_one_file(tmp_path: Path, unit: str, documents: list[str]):
    (tmp_path / "book").write_text("a\nb\n\nc\n")
    prepare.prepare(settings(tmp_path / "book", tmp_path / "out" / "book", document=unit))
    require(tmp_path / "out" / "book", documents)


def test_limit_takes_the_first_documents(texts: Path, tmp_path: Path):
    prepare.prepare(settings(texts, tmp_path / "few", limit=9, tokenizer_documents=3))
    require(tmp_path / "few", [text_of(i) for i in range(9)])


def word_tokenizer(folder: Path, size: int, **special: str) -> Path:
    """A tokenizer that begins each text by a token, cuts it after 4 and knows the words of `text_of`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "Document", *(word for word in WORDS if word.isalpha())]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)} | {"last": size - 1}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made.enable_truncation(4)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "token_type"), [(60, "uint16"), (65_500, "int32")])
def test_tokenizer_by_name(texts: Path, tmp_path: Path, size: int, token_type: str):
    from transformers import AutoTokenizer

    named = word_tokenizer(tmp_path / "words", size, eos_token="</s>", bos_token="<s>")
    changes = {"tokenizer": f"huggingface:{named}", "limit": 10}
    manifest, _ = prepare.prepare(settings(texts, tmp_path / "data", **changes))
    theirs = AutoTokenizer.from_pretrained(named)
    expected = [theirs(text_of(i), add_special_tokens=False, truncation=False)["input_ids"] for i in range(10)]
    assert read(tmp_path / "data") == [[*ids, 1] for ids in expected] and max(map(len, expected)) > 50
    assert (manifest["token_type"], manifest["eod"], manifest["vocabulary"]) == (token_type, 1, size)
    copied = AutoTokenizer.from_pretrained(f"{tmp_path / 'data'}-tokenizer")
    assert (copied.eos_token_id, copied.bos_token_id, copied.unk_token_id) == (1, 0, 2)
    with pytest.raises(SettingError, match="has no token that ends a text"):
        word_tokenizer(tmp_path / "endless", 60)
        prepare.prepare(settings(texts, tmp_path / "x", tokenizer=f"huggingface:{tmp_path / 'endless'}"))
    assert not (tmp_path / "x-tokenizer").exists()


# -- of the hub: its loader on a repository in a folder ----------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    def put(name: str, rows: list[str]) -> None:
        import pyarrow
        from pyarrow import parquet

        root, (_, config) = tmp_path / "hub" / name, hub.HUB[name]
        (root / "part").mkdir(parents=True)
        table = pyarrow.table({"id": list(range(len(rows))), "text": rows})
        parquet.write_table(table.slice(0, len(rows) // 2), root / "part" / "train-0.parquet")
        parquet.write_table(table.slice(len(rows) // 2), root / "part" / "train-1.parquet")
        files = "  data_files:\n  - split: train\n    path: part/train-*.parquet\n"
        (root / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")
        monkeypatch.setitem(hub.HUB, name, Hub(str(root), config))

    return put


def test_wikitext_is_cut_into_articles(repository: Callable[[str, list[str]], None], tmp_path: Path):
    first = ["", " = One = \n", "", " Text . \n", "", " = = Part = = \n", "", " = 1.5 = \n", " More . \n"]
    second = ["", " = Two = = 2 = \n", "", " Text . \n", ""]
    repository("wikitext-103", [*first, *second, " = Three = \n", "", " Text . \n"])
    manifest, _ = prepare.prepare(settings("wikitext-103", tmp_path / "wiki"))
    texts = [
        "\n = One = \n\n Text . \n\n = = Part = = \n\n = 1.5 = \n More . \n\n",
        " = Two = = 2 = \n\n Text . \n\n",
        " = Three = \n\n Text . \n",
    ]
    require(tmp_path / "wiki", texts)
    assert manifest["settings"]["source"]["config"] == "wikitext-103-raw-v1"
    prepare.prepare(settings("wikitext-103", tmp_path / "less", limit=2))
    require(tmp_path / "less", texts[:2])


def test_of_fineweb_edu_a_limit_takes_no_more_than_it_needs(
    repository: Callable[[str, list[str]], None], tmp_path: Path
):
    repository("fineweb-edu", [text_of(i) for i in range(40)])
    prepare.prepare(settings("fineweb-edu", tmp_path / "web"))
    require(tmp_path / "web", [text_of(i) for i in range(40)])
    shutil.rmtree(tmp_path / "hf-cache")
    prepare.prepare(settings("fineweb-edu", tmp_path / "less", limit=25))
    require(tmp_path / "less", [text_of(i) for i in range(25)])
    assert not list((tmp_path / "hf-cache").rglob("*.arrow"))


def test_without_a_network_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "prepare", "wikitext-103", "--out", str(tmp_path / "wiki")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alflb: SOURCE=wikitext-103: cannot be loaded: ") and "needs a network" in line
    assert not list(tmp_path.glob("wiki*"))


# -- kills and damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("many") / "many", 240, words=1000)


def start(source: Path, prefix: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Starts two processes on 120 shards; comes back when 5 are finished, with all processes below the first."""
    flags = ["--tokenizer", "train:300", "--tokenizer-documents", "20", "--shard-documents", "2", "--workers", "2"]
    command = [*ALFLB, "data", "prepare", str(source), "--out", str(prefix), *flags]
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(Path(f"{prefix}-parts").glob("shard-*.npz"))) < 5:
        assert running.poll() is None and time.monotonic() < deadline, running.stderr and running.stderr.read()
        time.sleep(0.005)
    return running, psutil.Process(running.pid).children(recursive=True)


def test_killed_and_started_again_it_ends_as_if_it_had_not_been(many: Path, tmp_path: Path):
    prefix = tmp_path / "killed"
    running, below = start(many, prefix)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert psutil.wait_procs(below, timeout=20)[1] == []  # nobody is left behind
    seals = list(Path(f"{prefix}-parts").glob("shard-*.npz"))
    assert 5 <= len(seals) < 120 and not list(tmp_path.glob("killed.*"))
    again = Preparation(
        str(many), str(prefix), tokenizer="train:300", tokenizer_documents=20, shard_documents=2, workers=1
    )
    manifest, new = prepare.prepare(again)
    assert new and manifest["documents"] == 240
    prepare.prepare(Preparation(**{**vars(again), "out": str(tmp_path / "unbroken"), "shard_documents": 100}))
    assert whole(prefix) == whole(tmp_path / "unbroken")


def test_a_worker_that_is_killed_ends_it_in_one_line(many: Path, tmp_path: Path):
    running, below = start(many, tmp_path / "killed")
    worker = max(below, key=lambda process: process.memory_info().rss)
    worker.kill()
    _, printed = running.communicate(timeout=60)
    assert running.returncode == 2
    assert printed.splitlines()[-1].startswith("alflb: --workers=2: one of them was killed (out of memory?)")


def broken_off(monkeypatch: pytest.MonkeyPatch, what: Preparation, place: Any, name: str) -> None:
    """Ctrl-C in the moment before `place.name` is called."""

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, interrupt)
        prepare.prepare(what)


def test_finished_shards_stay_and_damaged_ones_are_made_again(
    made: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    what = settings(texts, tmp_path / "data")
    broken_off(monkeypatch, what, shards, "merge")
    parts = sorted(what.parts.glob("shard-*"))
    assert len(parts) == 8

    def inodes() -> list[int]:
        return [path.stat().st_ino for path in parts]

    def change(number: int, content: bytes) -> None:
        """In place, so that a file made anew can be told from it."""
        with parts[number].open("r+b") as stream:
            stream.truncate(0)
            stream.write(content)

    before, content = inodes(), parts[0].read_bytes()
    with np.load(parts[0]) as shard:
        held = dict(shard)
    place = content.index(held["tokens"].tobytes())
    change(0, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])  # a bit of the tokens
    place = content.index(b"'shape': (") + len(b"'shape': (")
    change(1, content[:place] + b"0" + content[place + 1 :])  # one that would give fewer of them
    change(2, content[:-9])
    change(3, b"")
    change(4, b"[]")
    with parts[5].open("r+b") as stream:  # whole, and of other text
        np.savez(stream, **{**held, "digest": np.array("0" * 64)})
    broken_off(monkeypatch, what, shards, "merge")
    assert [new == old for new, old in zip(inodes(), before, strict=True)] == [False] * 6 + [True] * 2
    prepare.prepare(what)
    assert whole(tmp_path / "data") == whole(made)


FILES = ("settings.json", "tokenizer_config.json", "tokenizer.json", "shard-00003.npz")
MOMENTS = (*FILES, "data.bin", "data.idx", "data-tokenizer", "data.json")


@pytest.mark.parametrize("moment", MOMENTS)
def test_broken_off_anywhere_it_goes_on(
    made: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """Ctrl-C in the moment before this file or folder gets its name."""
    what, real = settings(texts, tmp_path / "data"), os.replace

    def replace(source: Any, to: Any) -> None:
        if Path(to).name == moment:
            raise KeyboardInterrupt
        real(source, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        prepare.prepare(what)
    assert what.parts.exists() and not (tmp_path / "data.json").exists()
    assert prepare.prepare(what)[1]
    assert whole(tmp_path / "data") == whole(made)


def test_what_was_wrong_can_be_put_right(made: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Until a shard is finished other settings begin anew, and nothing of the first ones is taken for theirs."""
    with pytest.raises(SettingError, match="--tokenizer="):
        prepare.prepare(settings(texts, tmp_path / "data", tokenizer="huggingface:no/such"))
    assert list(tmp_path.iterdir()) == []
    broken_off(monkeypatch, settings(texts, tmp_path / "data", tokenizer="train:280"), prepare, "_write_shards")
    prepare.prepare(settings(texts, tmp_path / "data"))
    assert whole(tmp_path / "data") == whole(made)


def test_check_finds_what_is_not_as_it_was_made(copy: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(copy)]) == 0
    assert "49 documents, 1 empty ones left out" in capsys.readouterr().out
    for name in (".bin", ".idx", "-tokenizer/tokenizer.json"):
        path = Path(f"{copy}{name}")
        content = path.read_bytes()
        for changed in (content[:-1], content[:99] + bytes([content[99] ^ 1]) + content[100:], None):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            assert main(["data", "check", str(copy)]) == 1
            printed = capsys.readouterr()
            (line,) = printed.err.splitlines()
            assert line.startswith(f"alflb: {path} ") and printed.out == ""
            path.write_bytes(content)
    assert main(["data", "check", str(copy)]) == 0
    manifest = Path(f"{copy}.json")
    for content in (
        b"",
        b"[]",
        b'{"format": 1}',
        b'{"format": 2}',
        manifest.read_bytes().replace(b'"bytes": {', b'"bytes": 3, "x": {'),
    ):
        manifest.write_bytes(content)
        assert main(["data", "check", str(copy)]) == 2 and "PREFIX=" in capsys.readouterr().err
    manifest.unlink()
    assert main(["data", "check", str(copy)]) == 2 and "has no corpus.v1.json" in capsys.readouterr().err


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_finished_one_is_not_made_again(copy: Path, texts: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in copy.parent.iterdir()}
    assert prepare.prepare(settings(texts, copy, workers=3, shard_documents=9))[1] is False
    for changes, named in (({"tokenizer": "train:301"}, "tokenizer train:300, now train:301"), ({"limit": 3}, "limit")):
        with pytest.raises(SettingError, match=f"--out=.*other settings .*{named}"):
            prepare.prepare(settings(texts, copy, **changes))
    other = shutil.copytree(texts, tmp_path / "other")
    (other / "0000.txt").write_text("another")
    with pytest.raises(SettingError, match=r"--out=.*other settings \(source "):
        prepare.prepare(settings(other, copy))
    assert {path: path.stat().st_mtime_ns for path in copy.parent.iterdir()} == before
    Path(f"{copy}.bin").write_bytes(b"short")
    with pytest.raises(SettingError, match="is not as it was made"):
        prepare.prepare(settings(texts, copy))


def test_parts_of_other_settings_are_refused_and_kept(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    what = settings(texts, tmp_path / "data")
    broken_off(monkeypatch, what, shards, "merge")
    for changes in ({"tokenizer": "train:301"}, {"shard_documents": 8}, {"limit": 20}, {"tokenizer_documents": 9}):
        (name,) = changes
        with pytest.raises(SettingError, match=rf"has parts of other settings in .* \({name} "):
            prepare.prepare(settings(texts, tmp_path / "data", **changes))
    assert len(list(what.parts.glob("shard-*.npz"))) == 8


@pytest.mark.parametrize("name", ["data.bin", "data.idx", "data.json", "data-tokenizer/x", "data-parts/x"])
def test_what_is_not_ours_is_not_written_over(texts: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(SettingError, match="--out="):
        prepare.prepare(settings(texts, tmp_path / "data"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [path] and path.read_text() == "{}"


def test_two_at_once_are_refused(texts: Path, tmp_path: Path):
    what = settings(texts, tmp_path / "data")
    with prepare._lock(what), pytest.raises(SettingError, match="is being prepared by another process"):
        prepare.prepare(what)


def file(root: Path, name: str, content: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no such source": (lambda t: t / "nowhere", {}, "SOURCE=.*no such file or folder; must be wikitext-103"),
    "no source": (lambda t: "", {}, "SOURCE=: no such file"),
    "binary file": (lambda t: file(t, "s/a.txt", b"a\0b"), {}, "SOURCE=.*a.txt: is not UTF-8 text"),
    "cut-off character": (lambda t: file(t, "s/a.txt", "é".encode()[:1]), {}, "is not UTF-8 text"),
    "binary jsonl": (lambda t: file(t, "s/a.jsonl", b"\xff").parent, {}, "a.jsonl: is not UTF-8 text"),
    "folder of pictures": (lambda t: file(t, "s/a.png", b"x").parent, {}, "holds no file to read; 1 with another"),
    "blank": (lambda t: file(t, "s/a.txt", b" \n"), {}, "SOURCE=.*all its documents are empty"),
    "empty jsonl": (lambda t: file(t, "s/a.jsonl", b""), {}, "SOURCE=.*holds no document"),
    "no JSON": (
        lambda t: file(t, "s/a.jsonl", b'{"text": "a"}\n{"text": '),
        {},
        'no object with a text as "text": .*{"te',
    ),
    "no field": (lambda t: file(t, "s/a.jsonl", b'{"content": "a"}'), {}, 'with a text as "text": .*content'),
    "a number": (lambda t: file(t, "s/a.jsonl", b'{"text": 3}'), {}, "no object with a text"),
    "a list": (lambda t: file(t, "s/a.jsonl", b"[1]"), {"text_field": "content"}, 'a text as "content"'),
    "no parquet": (lambda t: file(t, "s/a.parquet", b"PAR1"), {}, "a.parquet: is no parquet file"),
    "not a file": (lambda t: "/dev/null", {}, "SOURCE=/dev/null: cannot be read: .*no regular file"),
    "tokenizer": (lambda t: "x", {"tokenizer": "gpt2"}, "--tokenizer=gpt2: must be train:VOCABULARY or huggingface"),
    "no name": (lambda t: "x", {"tokenizer": "huggingface:"}, "--tokenizer=huggingface:: must be train:"),
    "no number": (lambda t: "x", {"tokenizer": "train:many"}, "needs a vocabulary of 257 tokens or more"),
    "small": (lambda t: "x", {"tokenizer": "train:256"}, "needs a vocabulary of 257 tokens or more"),
    "no tokenizer": (lambda t: file(t, "s/a.txt", b"a"), {"tokenizer": "huggingface:no/such"}, "cannot load it: "),
    "workers": (lambda t: "x", {"workers": 0}, "--workers=0: must be at least 1"),
    "unit": (lambda t: "x", {"document": "word"}, "--document=word: must be one of file, paragraph, line"),
    "limit": (lambda t: "x", {"limit": -1}, "--limit=-1: must be at least 0"),
    "config": (lambda t: "x", {"config": "sample-10BT"}, "--config=sample-10BT: is for wikitext-103 and fineweb-edu"),
    "split": (lambda t: "x", {"split": "test"}, "--split=test: is for wikitext-103"),
    "out": (lambda t: "x", {"out": "/"}, "--out=/: must end in a name"),
    "out inside": (lambda t: t, {}, "--out=.*must lie outside"),
    "out below a file": (lambda t: file(t, "s/a.txt", b"a"), {"out": "{}/s/a.txt/out"}, "--out=.*cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_explain_themselves(tmp_path: Path, case: str):
    make, changes, expected = WRONG[case]
    source = make(tmp_path)
    changes = {name: v.replace("{}", str(tmp_path)) if isinstance(v, str) else v for name, v in changes.items()}
    with pytest.raises(SettingError, match=expected) as caught:
        prepare.prepare(settings(source, changes.pop("out", tmp_path / "out" / "data"), **changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/data.*")) and not list(tmp_path.glob("out/data-tokenizer*"))


def test_a_column_that_is_not_there(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    for name in ("text", "n"):
        with pytest.raises(SettingError, match=f"--text-field={name}: is no column of texts in .*: body, n"):
            prepare.prepare(settings(tmp_path / "a.parquet", tmp_path / "out" / "x", text_field=name))
    prepare.prepare(settings(tmp_path / "a.parquet", tmp_path / "out" / "x", text_field="body"))
    require(tmp_path / "out" / "x", ["a"])


@pytest.mark.parametrize("package", ["datasets", "tokenizers", "transformers"])
def test_a_missing_package_is_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    real = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(
        SettingError, match=rf"needs the Python package {package}: pip install 'alflb_megatron\[data\]'"
    ):
        prepare.prepare(settings(texts, tmp_path / "x", tokenizer="huggingface:x"))


def test_a_terminal_gets_a_bar_over_the_documents(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pty

    ours, theirs = pty.openpty()  # of size zero, as in many a container
    printed: list[bytes] = []

    def listen() -> None:
        with contextlib.suppress(OSError):  # what a terminal answers whose other end is closed
            while piece := os.read(ours, 4096):
                printed.append(piece)

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        prepare.prepare(settings(texts, tmp_path / "data"))
    listener.join()
    os.close(ours)
    assert b"50/50 [" in b"".join(printed) and b"documents/s" in b"".join(printed)


def test_the_command_line_says_what_it_made(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["data", "prepare", str(texts), "--out", str(tmp_path / "data"), "--tokenizer", "train:300"]
    for said in ("bytes", "bytes; it was finished already"):
        assert main(command) == 0
        printed = capsys.readouterr()
        first, second = printed.out.splitlines()
        assert first.startswith(f"{tmp_path}/data: 49 documents, 1 empty ones left out, ") and first.endswith(said)
        assert second.endswith(f"--tokenizer huggingface:{tmp_path}/data-tokenizer --vocab-size 320")
        assert printed.err == ""  # no bar where there is no terminal
    assert main([*command, "--workers", "two"]) == 2
    assert capsys.readouterr().err == "alflb: --workers=two: must be of type int\n"
