from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alflb_megatron import metrics


def test_max_vio_is_wangs_definition() -> None:
    loads = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [7, 5, 3, 1]])
    assert metrics.max_vio(loads).tolist() == [0.0, 3.0, 0.75]


def test_violation_is_relative_to_the_mean_and_sums_to_zero() -> None:
    loads = torch.tensor([[7, 5, 3, 1]])
    assert metrics.violation(loads).tolist() == [[-0.75, -0.25, 0.25, 0.75]]
    assert metrics.violation(loads * 1000).tolist() == metrics.violation(loads).tolist()


def test_no_load_is_balanced() -> None:
    empty = torch.zeros(2, 4, dtype=torch.int64)
    assert metrics.max_vio(empty).tolist() == [0.0, 0.0]
    assert metrics.violation(empty).abs().sum() == 0


def test_loads_beyond_float32_are_exact() -> None:
    big = 2**40
    assert metrics.max_vio(torch.tensor([big + 2, big, big, big - 2])).item() == 2 / big


def test_bias_spread_ignores_a_constant() -> None:
    bias = torch.tensor([[0.5, -0.25, 0.0]])
    assert metrics.bias_spread(bias).item() == 0.75
    assert metrics.bias_spread(bias + 8).item() == 0.75


def test_variation_evenness_and_starvation_are_what_numpy_says() -> None:
    loads = torch.tensor([[7, 5, 3, 1], [16, 0, 0, 0], [4, 4, 4, 4], [1000, 1000, 1000, 99]])
    plain = loads.numpy().astype(float)
    assert np.allclose(metrics.variation(loads), plain.std(axis=1) / plain.mean(axis=1))
    shares = plain / plain.sum(axis=1, keepdims=True)
    entropy = [-sum(share * math.log(share) for share in row if share) for row in shares]
    assert np.allclose(metrics.evenness(loads), np.exp(entropy) / 4)
    below = plain < 0.1 * plain.mean(axis=1, keepdims=True)
    assert metrics.starved(loads).tolist() == below.tolist()
    assert below.sum() == 3, "99 of a mean of 774.75 is above a tenth"


def test_overload_is_that_of_the_fullest_rank() -> None:
    loads = torch.tensor([[7, 5, 3, 1], [0, 0, 8, 8], [0, 0, 0, 0]])
    assert metrics.overload(loads, 2).tolist() == [1.5, 2.0, 1.0]
    assert metrics.overload(loads, 4).tolist() == [1 + vio for vio in metrics.max_vio(loads).tolist()]


@pytest.mark.parametrize(("topk", "experts"), [(1, 8), (2, 16), (6, 64), (8, 8)])
def test_the_floor_of_large_batches_continues_that_of_drawn_ones(topk: int, experts: int) -> None:
    drawn = metrics.sampling_floor(metrics.DRAWN_UP_TO // 5, topk, experts, draws=400)
    assert drawn * math.sqrt(metrics.DRAWN_UP_TO // 5) == pytest.approx(metrics.floor_constant(topk, experts), rel=0.05)
    assert metrics.sampling_floor(10**7, topk, experts) == metrics.floor_constant(topk, experts) / math.sqrt(10**7)
