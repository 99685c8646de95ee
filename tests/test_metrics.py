from __future__ import annotations

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
