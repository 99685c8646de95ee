"""The plan of a sweep as a file: a small YAML of what to train, checked and expanded into runs of `alflb train`.

    about: one sentence, printed above the tables
    seeds: {full: [1], mini: [1, 2, 3]}         by scale
    train: {data: PREFIX, nproc: 64, ep: 8}     settings of `alflb train` for every run, by the names of its flags
    at: {mini: {certify: 20}}                   settings at one scale alone, over all others
    runs:                                       a run for every combination of what stands in lists, and every seed
      - {model: deepseek-moe-1b, gate: sigmoid, rule: none, aux: 1e-3}
      - {model: deepseek-moe-1b, gate: sigmoid, rule: sign, u: [1e-2, 1e-3], settings: {alflb_centring: false}}
      - {model: deepseek-moe-1b, rule: adaptive, label: every micro-batch, settings: {alflb_update_every: micro-batch}}
    published:                                  figures of others, by a run's name without its seed
      deepseek-moe-1b.sigmoid.sign.u0.001: {perplexity: 9.50, maxvio_global: 0.044}
    source: where the published figures stand
    compare: [[NAME, NAME], ...]                pairs whose order the tables judge
    scale_u: true                               multiply u as the scale says (`u_times`), where steps are fewer
    cluster: {utilisation: 0.35}                what the estimate of GPU-hours assumes
    executor: {kind: slurm, account: ACCOUNT}   where runs at full size go: local, slurm or skypilot

`model` is a preset, `u` the rule's step size, `aux` the coefficient of Megatron-Core's auxiliary loss, `label` tells
runs apart that differ in their settings alone. The scales beside `full` stand in `scales.yaml`, once for all plans:
settings that replace the full-size ones.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alflb_megatron.config import PREFIX, ALFConfig
from alflb_megatron.lab.records.files import regular
from alflb_megatron.lab.sweep.flops import UTILISATION
from alflb_megatron.lab.sweep.plan import FIGURES, FULL, Run, Sweep
from alflb_megatron.lab.training.job import UNBALANCED, Job
from alflb_megatron.lab.training.resolve import resolve
from alflb_megatron.models import ModelShape
from alflb_megatron.settings import SettingError, knobs

LARGEST = 2**20
"""Bytes of the largest plan that is read."""

_KEYS = {"about", "seeds", "train", "runs", "published", "source", "compare", "scale_u", "cluster", "executor", "at"}
_ROW = {"model", "gate", "rule", "u", "aux", "label", "settings"}
_SCALE = {"about", "train", "models", "u_times"}
_OWN = {"preset", "rule", "seed", "out", "resume", "requeue", "json", "gate", "aux_loss_coeff"}
"""Settings that the plan's other keys give."""


def shipped_plans() -> Path:
    """The folder of the plans that come with the package."""
    import alflb_megatron.plans

    return Path(alflb_megatron.plans.__file__).parent


def find_plan(name: str) -> Path:
    """The file of a plan: a path, or the name of one that comes with the package. Raises `SettingError`."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = sorted(p.stem for p in shipped_plans().glob("*.yaml") if p.stem != "scales")
    own = shipped_plans() / f"{name}.yaml"
    if name in known:
        return own
    raise SettingError("PLAN", name, f"must be a file, or one of {', '.join(known)}")


def read_plan(path: Path, scale: str = FULL, over: Mapping[str, Any] | None = None) -> Sweep:
    """The plan of a file at a scale, every run resolved and checked; the settings `over` win over all others.

    Raises `SettingError` that names the file and what is wrong in it, or the run whose settings cannot work.
    """
    text = _mapping(path, _yaml(path))
    _known(path, "key", text, _KEYS)
    scales = {FULL: {}, **_mapping(shipped_plans() / "scales.yaml", _yaml(shipped_plans() / "scales.yaml"))}
    if scale not in scales:
        raise SettingError("--scale", scale, f"must be one of {', '.join(scales)}")
    shrunk = scales[scale]
    _known(shipped_plans() / "scales.yaml", f"key of {scale}", shrunk, _SCALE)
    by_scale = {key: _mapping(path, text.get(key, {}), key) for key in ("seeds", "at")}
    for key, given in by_scale.items():
        _known(path, f"scale of {key}", given, set(scales))
    seeds, here = by_scale["seeds"].get(scale, [1234]), _settings(path, by_scale["at"].get(scale, {}))
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise SettingError(str(path), f"seeds: {seeds}", f"seeds of {scale} must be a list of whole numbers")
    rows = text.get("runs")
    if not isinstance(rows, list) or not rows:
        raise SettingError(str(path), "runs", "must be a list of runs")
    train = _settings(path, text.get("train", {}))
    if not isinstance(scale_u := text.get("scale_u", False), bool):
        raise SettingError(str(path), f"scale_u: {scale_u}", "must be true or false")
    times = _mapping(path, shrunk.get("u_times", {}), "u_times") if scale_u else {}
    cells = [cell for number, row in enumerate(rows, 1) for cell in _cells(path, number, row)]
    runs = []
    for seed in seeds:
        for cell in cells:
            small = {**shrunk.get("train", {}), **shrunk.get("models", {}).get(cell.model, {}), **here, **(over or {})}
            if shrunk.get("models") and cell.model not in shrunk["models"]:
                raise SettingError(str(path), cell.model, f"--scale {scale} knows {', '.join(shrunk['models'])}")
            runs.append(_run(path, cell, {**train, **cell.settings, **small}, seed, float(times.get(cell.rule, 1))))
    _unique(path, runs)
    groups = {run.group for run in runs}
    whole = runs if scale == FULL else read_plan(path).runs
    return Sweep(
        name=path.stem,
        scale=scale,
        about=str(text.get("about", "")).strip(),
        scale_about=str(shrunk.get("about", "")).strip(),
        runs=tuple(runs),
        published=_published(path, text.get("published", {}), groups),
        source=str(text.get("source", "")).strip(),
        compare=_pairs(path, text.get("compare", []), groups),
        full={run.group: run.plan for run in whole},
        utilisation=_utilisation(path, text.get("cluster", {})),
        executor=_mapping(path, text.get("executor", {}), "executor") if scale == FULL else {},
        planned=len(runs),
    )


def _yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-3 for a text; people do not."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    try:
        regular(path)
        if path.stat().st_size > LARGEST:
            raise SettingError("PLAN", path, f"must be a plan of at most {LARGEST} bytes")
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("PLAN", path, f"cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError("PLAN", path, f"is no YAML: {' '.join(str(error).split())}") from None


def _mapping(path: Path, value: Any, what: str = "the file") -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SettingError(str(path), value, f"{what} must map names to values")
    return value


def _known(path: Path, what: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise SettingError(str(path), name, f"no such {what}; there are {', '.join(sorted(known))}")


def _settings(path: Path, given: Any) -> dict[str, Any]:
    """Settings of `alflb train`, those of the bias with their prefix (`alflb_centring`)."""
    given = _mapping(path, given, "settings")
    ours = {f"{PREFIX}{one.name}".replace("-", "_") for one, *_ in knobs(ALFConfig)}
    known = {one.name for cls in (Job, ModelShape) for one, *_ in knobs(cls)} | ours
    _known(path, "setting of alflb train", given, known)
    for name in given:
        if name in _OWN or name in ("alflb_rule", "alflb_step_size"):
            raise SettingError(str(path), name, "is given by a run's own keys (model, gate, rule, u, aux) and `seeds`")
    return given


@dataclass(frozen=True)
class _Cell:
    model: str
    gate: str
    rule: str
    u: float | None
    aux: float
    label: str
    settings: Mapping[str, Any]

    @property
    def group(self) -> str:
        parts = [self.model, self.gate]
        if not (self.aux and self.rule == "none"):
            parts.append(self.rule)
        if self.u is not None:
            parts.append(f"u{self.u:g}")
        if self.aux:
            parts.append(f"aux{self.aux:g}")
        if self.label:
            parts.append(self.label.replace(" ", "-"))
        return ".".join(parts)


def _cells(path: Path, number: int, row: Any) -> Iterator[_Cell]:
    row = _mapping(path, row, f"run {number}")
    _known(path, f"key of run {number}", row, _ROW)
    for name in ("model", "rule"):
        if name not in row:
            raise SettingError(str(path), f"run {number}", f"needs `{name}`")
    settings, label = _settings(path, row.get("settings", {})), row.get("label", "")
    if not isinstance(label, str) or not re.fullmatch(r"[\w -]*", label):
        raise SettingError(str(path), f"run {number}: label: {label}", "must be letters, digits, spaces and hyphens")
    axes = [_listed(row.get(name, default)) for name, default in
            (("model", None), ("gate", "sigmoid"), ("rule", None), ("u", None), ("aux", 0.0))]  # fmt: skip
    if not all(axes):
        raise SettingError(str(path), f"run {number}", "must not have an empty list: it would be no run at all")
    for model, gate, rule, u, aux in itertools.product(*axes):
        for name, value in (("u", u), ("aux", aux)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SettingError(str(path), f"run {number}: {name}: {value}", "must be a number")
        yield _Cell(str(model), str(gate), str(rule), u, aux, label, settings)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _run(path: Path, cell: _Cell, settings: Mapping[str, Any], seed: int, times: float) -> Run:
    given: dict[str, Any] = {"preset": cell.model, "rule": cell.rule, **settings, "gate": cell.gate, "seed": seed}
    if cell.aux:
        given["aux_loss_coeff"] = float(cell.aux)
    if cell.u is not None:
        given["alflb_step_size"] = float(f"{cell.u * times:.12g}")  # 1e-3 * 10 is 0.01, not 0.010000000000000002
    prefix = PREFIX.replace("-", "_")
    if cell.rule in UNBALANCED:  # what is said of our biases has no meaning there
        ours = {k for k in given if k == "certify" or (k.startswith(prefix) and k != "alflb_step_size")}
        given = {k: v for k, v in given.items() if k not in ours}
    fields = [{one.name for one, *_ in knobs(cls)} for cls in (Job, ModelShape)]
    parts = [{k: v for k, v in given.items() if k in names} for names in fields]
    alf = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    try:
        plan = resolve(parts[0], parts[1], alf)
    except (SettingError, TypeError) as error:
        raise SettingError(str(path), cell.group, f"this run cannot work: {error}") from None
    return Run(cell.group, cell.label, cell.u, plan, given)


def _unique(path: Path, runs: Sequence[Run]) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise SettingError(str(path), run.name, "stands in the plan twice")
        seen.add(run.name)


def _published(path: Path, given: Any, groups: set[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for group, figures in _mapping(path, given, "published").items():
        if group not in groups:
            raise SettingError(str(path), f"published: {group}", f"no such run; there are {', '.join(sorted(groups))}")
        figures = _mapping(path, figures, f"published: {group}")
        _known(path, f"figure of {group}", figures, set(FIGURES))
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SettingError(str(path), f"published: {group}: {name}: {value}", "must be a number")
        found[group] = {name: float(value) for name, value in figures.items()}
    return found


def _pairs(path: Path, given: Any, groups: set[str]) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list):
        raise SettingError(str(path), f"compare: {given}", "must be a list of pairs of runs")
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2 or not set(map(str, pair)) <= groups:
            raise SettingError(str(path), f"compare: {pair}", "must be two runs' names without their seeds")
    return tuple((one, other) for one, other in given)


def _utilisation(path: Path, given: Any) -> float:
    cluster = _mapping(path, given, "cluster")
    _known(path, "key of cluster", cluster, {"utilisation"})
    share = cluster.get("utilisation", UTILISATION)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise SettingError(str(path), f"cluster: utilisation: {share}", "must be above 0 and at most 1")
    return float(share)
