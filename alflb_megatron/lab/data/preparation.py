"""The settings of `alflb data prepare`: what each may be, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alflb_megatron.lab.data.corpus import UNITS, Source
from alflb_megatron.lab.data.hub import HUB
from alflb_megatron.lab.data.shards import with_ending
from alflb_megatron.lab.data.vocabulary import SMALLEST, check_spec
from alflb_megatron.settings import SettingError, check, knob


@dataclass(frozen=True)
class Preparation:
    """How text becomes tokens. Equal settings on an equal source give the same bytes, whatever `workers`."""

    source: str
    out: str = knob("", "path prefix of what is written; default data/ and the name of the source", metavar="PREFIX")
    tokenizer: str = knob(
        "train:32000",
        f"train:N trains byte-level BPE of N tokens (at least {SMALLEST}) on the text; "
        "huggingface:NAME_OR_FOLDER takes that one",
        metavar="NAME",
    )
    tokenizer_documents: int = knob(
        100_000, "documents a tokenizer is trained on at most, evenly spread over the text", minimum=1
    )
    limit: int = knob(0, "documents to take, the first ones; 0 for all", minimum=0)
    workers: int = knob(1, "processes that cut text into tokens", minimum=1, maximum=4096)
    shard_documents: int = knob(
        1000, "documents that one process does at a time, and that a kill costs at most", minimum=1
    )
    document: str = knob("file", "what a document is in a plain-text file", choices=tuple(UNITS))
    text_field: str = knob("text", "the field or column of .jsonl, .parquet and hub data that holds the text")
    config: str = knob(
        "", f"configuration of a hub data set; default {', '.join(hub.config for hub in HUB.values())}", metavar="NAME"
    )
    split: str = knob("train", "split of a hub data set", metavar="NAME")
    revision: str = knob("", "commit, branch or tag of a hub data set; default its newest", metavar="NAME")

    @property
    def prefix(self) -> Path:
        name = self.source if self.source in HUB else Path(self.source).expanduser().resolve().stem
        return Path(self.out or f"data/{name}").expanduser()

    @property
    def tokenizer_folder(self) -> Path:
        return with_ending(self.prefix, "-tokenizer")

    @property
    def parts(self) -> Path:
        return with_ending(self.prefix, "-parts")

    def require_sound(self) -> None:
        """SettingError for what cannot work, before anything is read or imported."""
        check(self)
        check_spec(self.tokenizer)
        if not self.prefix.name:
            raise SettingError("--out", self.out, "must end in a name: PREFIX.bin and others are written")
        if self.source not in HUB:
            for name in ("config", "split", "revision"):
                if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                    raise SettingError(f"--{name}", value, f"is for {' and '.join(HUB)}; {self.source} is a local path")
            source = Path(self.source).expanduser().resolve()
            if source.is_dir() and self.prefix.resolve().is_relative_to(source):
                raise SettingError("--out", self.prefix, f"must lie outside {self.source}, or it would be read as text")

    def decided_by(self, source: Source) -> dict[str, Any]:
        """All that decides the tokens, but for the versions of packages."""
        trained = {"tokenizer_documents": self.tokenizer_documents} if self.tokenizer.startswith("train:") else {}
        return {"source": source.identity, "limit": self.limit, "tokenizer": self.tokenizer, **trained}
