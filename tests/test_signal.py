"""The gradient's signal-to-noise ratio, on gradients whose mean and variance are known."""

import math

import pytest
import torch

from core.method.signal import OVER, power, snr

SIZES = (30, 50)


def rows(ratio, count, learning_rate=0.0, dtype=torch.float32, kind=torch.optim.AdamW):
    """Metrics rows of `count` Gaussian gradients with |E g|^2 / tr var g = ratio, tr var g = 1."""
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in SIZES]
    optimizer, found = kind(parameters, lr=learning_rate), []
    for _ in range(count):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.grad = ((noise + ratio**0.5) / sum(SIZES) ** 0.5).to(dtype)
        found.append(power(parameters, optimizer))
        optimizer.step()
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 10.0])
def test_the_ratio_is_that_of_known_gradients(ratio):
    seen = rows(ratio, 801)[1:]
    signal, total = (sum(row[key] for row in seen) / len(seen) for key in ("grad_signal", "grad_power"))
    assert signal == pytest.approx(ratio, abs=0.01 * (1 + ratio)) and total == pytest.approx(1 + ratio, rel=0.02)
    short = [snr(seen[: first + OVER]) for first in range(0, len(seen) - OVER, OVER)]
    assert sum(short) / len(short) == pytest.approx(ratio, abs=0.01 * (1 + ratio) + 0.02 * ratio)


def test_it_is_of_the_gradients_alone_and_not_of_the_learning_rate():
    for one, other in zip(rows(0.5, 30), rows(0.5, 30, learning_rate=1.0)):
        assert one == other


def test_bfloat16_adapters_have_the_same_ratio():
    assert snr(rows(0.5, OVER, dtype=torch.bfloat16)) == pytest.approx(snr(rows(0.5, OVER)), rel=0.02)


def test_nothing_is_claimed_where_nothing_is_known():
    first, second = rows(1.0, 2)
    assert first == {} and second.keys() == {"grad_signal", "grad_power"}
    assert math.isnan(snr([])) and math.isnan(snr([{"reward": 1.0}, first]))
    assert rows(1.0, 3, kind=torch.optim.SGD) == [{}] * 3
    assert math.isnan(snr([{"grad_signal": 1.0, "grad_power": 1.0}]))  # no noise at all: no ratio
