"""Expert biases into and out of real Megatron-Core models: every stage, every kind of router, nothing by halves."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alflb_megatron.biases import Biases, bias_from_qb_beta, threshold_of_qb_beta
from alflb_megatron.hosts import huggingface
from alflb_megatron.settings import SettingError
from tests.distributed import jobs, ranks

EXPERTS = jobs.SMALL["num_experts"]
VERSION = tuple(int(part) for part in importlib.metadata.version("megatron-core").split(".")[:2])


def _biases(*layers: int, **about: Any) -> Biases:
    rows = {k: torch.randn(EXPERTS, generator=torch.Generator().manual_seed(k)) for k in layers}
    return Biases(rows, **{"num_layers": 4, **about})


# -- every stage takes its layers --------------------------------------------------------------------------------------


def _loaded(job: dict[str, Any], shape: dict[str, Any], source: Any, steps: int = 3) -> dict[str, Any]:
    """Trains, so that biases and rule state are not those of the beginning; what they are after `load_bias`."""
    from megatron.core import parallel_state

    from alflb_megatron.hosts.expert_bias import bias_of, load_bias

    plan = jobs.plan(job, shape)
    with ranks.model_parallel(**jobs.sizes(plan)):
        runner = jobs.Runner(plan)
        for step in range(steps):
            runner.step(step)
        chunks = runner.setup.chunks
        before = bias_of(chunks, parallel_state.get_pipeline_model_parallel_group())
        loaded = load_bias(chunks, source)
        routers = runner.setup.balancer.routers
        states = [router.read_state() for router in routers] if plan.alf else []
        fresh = plan.alf.rule_knobs.init(layers=1, experts=plan.shape.num_experts) if plan.alf else {}
        return {
            "before": before.rows,
            "loaded": loaded,
            "here": bias_of(chunks).rows,
            "everywhere": bias_of(chunks, parallel_state.get_pipeline_model_parallel_group()),
            "dtypes": {router.expert_bias.dtype for router in routers},
            "n": [int(n) for n, _ in states],
            "afresh": all(torch.equal(row, fresh[name][0]) for _, state in states for name, row in state.items()),
        }


def _same(rows: Any, expected: dict[int, Tensor]) -> bool:
    return list(rows) == list(expected) and all(torch.equal(rows[k], expected[k]) for k in expected)


def test_every_stage_takes_its_layers_and_the_rule_starts_afresh(tmp_path: Path) -> None:
    source = _biases(2, 3, 4, 5, score_function="sigmoid")  # the last of an MTP layer, which this model has not
    huggingface.save(source, tmp_path / "bias.safetensors")
    job = {"rule": "adaptive", "nproc": 2, "pp": 2, "vpp": 2, "micro_batch_size": 2}
    results = ranks.run(2, _loaded, job, {}, str(tmp_path / "bias.safetensors"))
    expected = {layer: source.rows[layer] for layer in (2, 3, 4)}
    for result in results:
        assert not _same(result["before"], expected) and result["before"].keys() == expected.keys()
        assert _same(result["everywhere"].rows, expected)
        assert result["n"] == [0] * len(result["here"]) and result["afresh"]
    here = [list(result["here"]) for result in results]
    assert sorted(here[0] + here[1]) == [2, 3, 4] and all(here)
    assert [result["loaded"] for result in results] == [dict.fromkeys(layers, EXPERTS) for layers in here]
    about = results[0]["everywhere"]
    assert (about.num_layers, about.score_unit, about.score_function) == (4, "score", "sigmoid")


def test_mtp_layers_follow_the_decoders() -> None:
    source = _biases(2, 3, 4, 5)
    result = ranks.run(1, _loaded, {"rule": "sign", "nproc": 1}, {"mtp_layers": 1}, source)[0]
    assert _same(result["here"], dict(source.rows))
    assert huggingface.NAME.format(index=4) in _names(result["everywhere"])


def _names(biases: Biases) -> list[str]:
    return [huggingface.NAME.format(index=layer - 1) for layer in biases.rows]


def test_megatrons_own_bias_is_read_and_started_in_float32() -> None:
    source = _biases(2, 3, 4)
    job = {"rule": "builtin", "nproc": 1, "dtype": "bf16"}
    result = ranks.run(1, _loaded, job, {}, source, 0)[0]  # before a forward pass its buffer is bfloat16 still
    assert result["dtypes"] == {torch.float32} and _same(result["here"], dict(source.rows))


MISFITS: list[tuple[str, Biases, dict[str, Any], str]] = [
    ("none", _biases(2, 3, 4), {}, "layer 2 has none"),
    ("sign", _biases(2, 3), {}, "no bias for layer 4, which is MoE here; it has 2, 3"),
    ("sign", _biases(1, 2, 3, 4), {}, "a bias for layer 1; the model has MoE layers 2 to 4"),
    ("sign", _biases(2, 3, 4, num_layers=61), {}, "decoder of 61 layers; the model has 4"),
    ("sign", _biases(2, 3, 4, 5, num_layers=None), {}, "a bias for layer 5"),
    ("sign", Biases({**_biases(2, 3).rows, 4: torch.zeros(12)}), {}, "12 experts in layer 4; the model has 8"),
    ("sign", _biases(2, 3, 4), {"score_unit": "logit"}, "for the score; the router adds its own to the logit"),
    ("sign", _biases(2, 3, 4, score_function="softmax"), {}, "softmax gate; the model has a sigmoid gate"),
    ("sign", Biases({2: torch.full((EXPERTS,), torch.nan)}), {}, "layer 2 holds a NaN"),
]


def _refused() -> list[tuple[str, bool]]:
    """What is said of each source that does not fit, and whether every bias is as it was."""
    from alflb_megatron.hosts.expert_bias import load_bias

    said = []
    for rule, source, alf, _ in MISFITS:
        plan = jobs.plan({"rule": rule, "nproc": 1}, **alf)
        with ranks.model_parallel(**jobs.sizes(plan)):
            runner = jobs.Runner(plan)
            before = [None if r.expert_bias is None else r.expert_bias.clone() for r in runner.routers]
            try:
                load_bias(runner.setup.chunks, source, "--bias")
                said.append(("", False))
            except SettingError as error:
                kept = zip(before, runner.routers, strict=True)
                said.append((str(error), all(old is None or torch.equal(old, r.expert_bias) for old, r in kept)))
    return said


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    for (said, kept), (*_, text) in zip(ranks.run(1, _refused)[0], MISFITS, strict=True):
        assert said.startswith("--bias=biases: ") and text in said
        assert kept


# -- quantile balancing of Megatron-Core -------------------------------------------------------------------------------


def _quantile(score_function: str, dtype: torch.dtype, threshold: bool) -> dict[str, Any]:
    """Megatron's own quantile balancing with random betas, and our router with what they are converted to."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from alflb_megatron.config import ALFConfig
    from alflb_megatron.hosts.core import RouterBuilder
    from alflb_megatron.hosts.expert_bias import bias_of, load_bias
    from alflb_megatron.lab.training import build

    plan = jobs.plan({"rule": "none", "nproc": 1}, {"gate": score_function})
    with ranks.model_parallel(**jobs.sizes(plan)):
        config = build.transformer_config(plan)
        theirs_config = dataclasses.replace(config, moe_router_load_balancing_type="quantile_balancing")
        theirs = TopKRouter(theirs_config, get_default_pg_collection())
        theirs.qb_beta.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)))
        logits = torch.randn(512, 2, EXPERTS, generator=torch.Generator().manual_seed(2)).to(dtype)
        ours = RouterBuilder(ALFConfig(score_unit="score" if threshold else "logit"))(
            config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False
        )
        for router in (theirs, ours):
            router.set_layer_number(2)
            router.eval()
        unbiased = ours.routing(logits)[1]
        found = bias_of([theirs])
        if threshold:
            rows = logits.view(-1, EXPERTS)
            at = threshold_of_qb_beta(rows, theirs.qb_beta, plan.shape.topk, score_function)
            found = dataclasses.replace(
                found, rows={2: bias_from_qb_beta(theirs.qb_beta, score_function, at)}, score_unit="score"
            )
        load_bias([ours], found)
        (their_probs, their_map), (probs, chosen) = theirs.routing(logits), ours.routing(logits)
        return {
            "unit": found.score_unit,
            "same": torch.equal(their_map, chosen) and torch.equal(their_probs, probs),
            "alike": float((their_map & chosen).sum() / their_map.sum()),
            "unbiased": float((their_map & unbiased).sum() / their_map.sum()),
        }


def _quantiles() -> dict[tuple[str, str, bool], dict[str, Any]]:
    cases = [("float32", False), ("bfloat16", False), ("float32", True)]
    return {
        (gate, dtype, threshold): _quantile(gate, getattr(torch, dtype), threshold)
        for gate in ("sigmoid", "softmax")
        for dtype, threshold in cases
    }


@pytest.mark.skipif(VERSION < (0, 19), reason="quantile balancing came with megatron-core 0.19")
def test_qb_beta_chooses_as_megatron_does() -> None:
    for (gate, dtype, threshold), result in ranks.run(1, _quantiles)[0].items():
        print(gate, dtype, result)
        assert result["unit"] == ("score" if threshold else "logit")
        assert result["unbiased"] < 1, "the betas decide nothing"
        if threshold:  # on scores no bias does for every token
            assert 1 - result["alike"] < (1 - result["unbiased"]) / 3
        else:
            assert result["same"]
