"""`alflb data`: text to Megatron's indexed format (`prepare`), and whether its files are as they were made (`check`).

    PREFIX.bin, PREFIX.idx    the tokens, written by Megatron-Core
    PREFIX-tokenizer/         the tokenizer, for `--tokenizer huggingface:PREFIX-tokenizer`
    PREFIX.json               the manifest, written last: source, settings, counts, SHA-256 of all files, versions
    PREFIX-parts/             what is finished of a preparation that is not; it goes when the manifest is there

Nothing here unpickles, and no code of a data set or a tokenizer is run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alflb_megatron.lab.data import shards
from alflb_megatron.lab.data.corpus import SOURCES, Corpus, Source, find_local
from alflb_megatron.lab.data.digests import digests, fingerprint, sha256
from alflb_megatron.lab.data.errors import need, one_line
from alflb_megatron.lab.data.hub import HUB, find_hub
from alflb_megatron.lab.data.manifest import FORMAT, damage, read, read_manifest
from alflb_megatron.lab.data.preparation import Preparation
from alflb_megatron.lab.data.shards import ENDINGS, Counts, Work, with_ending
from alflb_megatron.lab.data.vocabulary import Vocabulary, make, threads
from alflb_megatron.lab.records.files import write_json
from alflb_megatron.lab.records.versions import versions
from alflb_megatron.settings import SettingError, add_flags, given_flags

SETTINGS = "settings.json"
"""In PREFIX-parts: what the parts are made from."""


# -- prepare -----------------------------------------------------------------------------------------------------------


def prepare(settings: Preparation) -> tuple[dict[str, Any], bool]:
    """Makes what is not there yet; the manifest, and whether anything was made.

    Raises:
        SettingError: one setting, its value and what is allowed; also where files of another preparation, or of
            something else, bear the name.
    """
    settings.require_sound()
    need("datasets", "SOURCE", settings.source)
    need("tokenizers", "--tokenizer", settings.tokenizer)
    if settings.tokenizer.startswith("huggingface:"):
        need("transformers", "--tokenizer", settings.tokenizer)
    threads(settings.workers)
    _quieten()
    try:
        manifest = read_manifest(settings.prefix, "--out")
        if manifest is None:
            _require_free(settings)
        source = _find(settings)
        if manifest is None:
            with _lock(settings):
                return _make(settings, source), True
        other = "is finished and was made from other settings"
        _require_same(settings, manifest["settings"], settings.decided_by(source), other)
        _require_sizes(settings, manifest)
        shutil.rmtree(settings.parts, ignore_errors=True)  # of one that was killed with its last breath
        return manifest, False
    except OSError as error:
        raise SettingError("--out", settings.prefix, f"cannot be written: {one_line(error)}") from error


def _find(settings: Preparation) -> Source:
    source, field = settings.source, settings.text_field
    if source in HUB:
        return find_hub(source, settings.config, settings.split, settings.revision, field)
    return find_local(source, settings.document, field)


def _make(settings: Preparation, source: Source) -> dict[str, Any]:
    prefix, parts, decided = settings.prefix, settings.parts, settings.decided_by(source)
    begun = {**decided, "shard_documents": settings.shard_documents}
    record = parts / SETTINGS
    if record.exists() and _has_shards(parts):
        _require_same(settings, read(record, "--out"), begun, f"has parts of other settings in {parts}")
    for note in source.notes:
        print(note, file=sys.stderr)
    rows = parts / "rows"
    rows.mkdir(exist_ok=True)
    corpus = source.open(settings.limit, rows)
    if not len(corpus):
        raise SettingError("SOURCE", settings.source, "holds no document")
    write_json(record, begun)
    try:
        tokenizer, vocabulary = _vocabulary(settings, corpus, decided)
        digest = fingerprint({**begun, "tokenizer_files": vocabulary.files})
        work = Work(corpus, tokenizer, vocabulary, parts, settings.shard_documents, digest)
        counts = _write_shards(settings, work)
    except ValueError as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError("SOURCE", settings.source, one_line(error)) from error
    if not counts.documents:
        raise SettingError("SOURCE", settings.source, "holds no text: all its documents are empty")
    token_type = shards.merge(work, parts / "merged")
    merged = {ending: parts / f"merged{ending}" for ending in ENDINGS}
    manifest = {
        "format": FORMAT,
        "settings": decided,
        "left_out": source.notes,
        "documents": counts.documents,
        "empty_documents": counts.read - counts.documents,
        "tokens": counts.tokens,
        "token_type": token_type,
        "vocabulary": vocabulary.size,
        "eod": vocabulary.eod,
        "bytes": {ending: path.stat().st_size for ending, path in merged.items()},
        "sha256": {ending: sha256(path) for ending, path in merged.items()},
        "tokenizer_sha256": vocabulary.files,
        "versions": _versions(),
    }
    for ending, path in merged.items():  # .bin first: alone it is no data set to anyone
        shards.put(path, with_ending(prefix, ending))
    if tokenizer != settings.tokenizer_folder:
        os.replace(tokenizer, settings.tokenizer_folder)
    write_json(with_ending(prefix, ".json"), manifest)
    return manifest


def _vocabulary(settings: Preparation, corpus: Corpus, decided: dict[str, Any]) -> tuple[Path, Vocabulary]:
    """The tokenizer and its folder, made unless it is there and whole."""
    record, folder = settings.parts / "tokenizer.json", settings.parts / "tokenizer"
    digest = fingerprint(decided)
    if record.exists():
        there = read(record, "--out")
        vocabulary = Vocabulary(**there["vocabulary"])
        for place in (folder, settings.tokenizer_folder):
            if there["made_from"] == digest and vocabulary.files == digests(place):
                return place, vocabulary
    vocabulary = make(settings.tokenizer, corpus, settings.tokenizer_documents, folder)
    write_json(record, {"made_from": digest, "vocabulary": dataclasses.asdict(vocabulary)})
    return folder, vocabulary


def _write_shards(settings: Preparation, work: Work) -> Counts:
    """Makes the shards under a progress bar; the sums of their counts."""
    from tqdm import tqdm

    sums = Counts()
    try:
        # A terminal that gives its size as zero would get an empty bar; this takes 80 by 24 for it.
        columns, lines = shutil.get_terminal_size()
        silent = not sys.stderr.isatty()
        with tqdm(total=len(work.corpus), unit=" documents", ncols=columns, nrows=lines, disable=silent) as bar:
            for counts in shards.write_shards(work, settings.workers):
                sums = Counts(*(sum(pair) for pair in zip(sums, counts, strict=True)))
                bar.update(counts.read)
    except shards.BrokenProcessPool as error:
        why = "one of them was killed (out of memory?); the same command goes on where it ended"
        raise SettingError("--workers", settings.workers, why) from error
    return sums


def _require_free(settings: Preparation) -> None:
    """SettingError where something that is no preparation of ours bears one of the names."""
    if (settings.parts / "lock").exists():
        return
    taken = [with_ending(settings.prefix, ending) for ending in ENDINGS] + [settings.tokenizer_folder, settings.parts]
    for path in taken:
        if path.exists():
            raise SettingError("--out", settings.prefix, f"{path} is there, and not of a preparation; name another")


def _has_shards(parts: Path) -> bool:
    """Whether there is work that is worth keeping: without it other settings may begin anew."""
    return any(parts.glob("shard-*.npz"))


def _require_same(settings: Preparation, there: Any, here: dict[str, Any], what: str) -> None:
    """SettingError that names the settings that differ."""
    there = there if isinstance(there, dict) else {}
    differing = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if differing:
        said = ", ".join(f"{name} {there.get(name)}, now {here.get(name)}" for name in differing)
        raise SettingError("--out", settings.prefix, f"{what} ({said}); name another, or remove it")


def _require_sizes(settings: Preparation, manifest: dict[str, Any]) -> None:
    for ending in ENDINGS:
        path = with_ending(settings.prefix, ending)
        if not path.is_file() or path.stat().st_size != manifest["bytes"][ending]:
            how = "remove its files, or name another"
            raise SettingError("--out", settings.prefix, f"{path} is not as it was made; {how}")


@contextlib.contextmanager
def _lock(settings: Preparation) -> Iterator[None]:
    """Holds PREFIX-parts for this process alone; removes it at the end, and after a mistake that left no shard."""
    settings.parts.mkdir(parents=True, exist_ok=True)
    with (settings.parts / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError("--out", settings.prefix, "is being prepared by another process") from None
        if with_ending(settings.prefix, ".json").exists():
            raise SettingError("--out", settings.prefix, "was finished by another process just now")
        try:
            yield
        except SettingError:
            if not _has_shards(settings.parts):
                shutil.rmtree(settings.parts)
            raise
        shutil.rmtree(settings.parts)


def _quieten() -> None:
    """Errors of these libraries end in one line of ours; their bars are for terminals."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _versions() -> dict[str, str | None]:
    found = versions()
    for name in ("datasets", "tokenizers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- the command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands to `parser`."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=type(parser))
    making = commands.add_parser("prepare", help="text to Megatron's .bin and .idx", allow_abbrev=False)
    making.add_argument("source", metavar="SOURCE", help=SOURCES)
    add_flags(making, Preparation)
    checking = commands.add_parser("check", help="whether the files are as they were made", allow_abbrev=False)
    checking.add_argument("prefix", metavar="PREFIX", help="what --out named")


def run(flags: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Runs `prepare` or `check`; the exit code: 1 where `check` found damage."""
    if flags.what == "check":
        prefix = Path(flags.prefix).expanduser()
        manifest, found = damage(prefix)
        for line in found:
            print(f"alflb: {line}", file=sys.stderr)
        if not found:
            print(f"{prefix}: {_in_words(manifest)}; all files are as they were made")
        return 1 if found else 0
    settings = Preparation(flags.source, **given_flags(flags, Preparation))
    manifest, made = prepare(settings)
    print(f"{settings.prefix}: {_in_words(manifest)}" + ("" if made else "; it was finished already"))
    rows = -(-manifest["vocabulary"] // 64) * 64  # whole multiples of 64 suit every tensor-parallel split
    print(
        f"alflb train --data {settings.prefix} --tokenizer huggingface:{settings.tokenizer_folder} --vocab-size {rows}"
    )
    return 0


def _in_words(manifest: dict[str, Any]) -> str:
    empty = f", {manifest['empty_documents']} empty ones left out" if manifest["empty_documents"] else ""
    return (
        f"{manifest['documents']} documents{empty}, {manifest['tokens']} tokens "
        f"of a vocabulary of {manifest['vocabulary']}, {sum(manifest['bytes'].values())} bytes"
    )
