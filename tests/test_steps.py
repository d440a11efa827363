"""core.method.steps against the peers' own step functions (tests/data/step_values.json: values produced by running the
public code of Flow-GRPO, FlowCPS and DiffusionNFT in float64; the file's `about` names the commits) and against theory.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.method.steps import KINDS, step

REFERENCE = json.loads((Path(__file__).parent / "data" / "step_values.json").read_text())
INPUTS = {name: torch.tensor(value, dtype=torch.float64) for name, value in REFERENCE["inputs"].items()}


def run(row, **kwargs):
    return step(
        row["step"],
        kwargs.pop("x", INPUTS["x"]),
        kwargs.pop("v", INPUTS["v"]),
        row["sigma"],
        row["sigma_next"],
        row["noise_level"],
        row["sigma_max"],
        **kwargs,
    )


@pytest.mark.parametrize(
    "row", REFERENCE["steps"], ids=lambda r: f"{r['source'].split('@')[0]}-{r['step']}-a{r['noise_level']}-i{r['i']}"
)
def test_agrees_with_the_peers(row):
    ours = run(row, noise=INPUTS["eps"])
    next_latent = torch.tensor(row["next"], dtype=torch.float64)
    torch.testing.assert_close(ours.latent, next_latent, atol=1e-6, rtol=1e-6)
    if row["log_prob"] is None:
        return
    for v, expected in ((INPUTS["v"], row["log_prob"]), (INPUTS["v_new"], row.get("log_prob_new"))):
        if expected is None:
            continue
        scored = run(row, v=v, next_latent=next_latent)
        if row["step"] == "cps":  # this peer's "log_prob" is -mean((next - mean)^2)
            ours_value = -((next_latent - scored.mean) ** 2).flatten(1).mean(1)
        else:
            ours_value = scored.log_prob
        torch.testing.assert_close(ours_value, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("table", REFERENCE["exact"], ids=lambda t: f"{t['schedule']}-a{t['a']}")
def test_exact_step_agrees_with_20000_euler_substeps(table):
    for row in table["rows"]:
        ours = step(
            "exact", INPUTS["x"], INPUTS["v"], row["sigma"], row["sigma_next"], table["a"], 0.96, noise=INPUTS["eps"]
        )
        assert float(ours.std) == pytest.approx(row["std"], abs=1e-6)


def test_exact_step_is_the_limit_of_flow_sde():
    """Many Euler substeps of flow_sde with x0h frozen have the mean and the std of one exact step."""
    s, n, a, substeps = 0.8, 0.6, 0.7, 20000
    x, x0 = torch.tensor([[1.3]], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)
    mean, variance = x.clone(), torch.zeros_like(x)
    sigmas = torch.linspace(s, n, substeps + 1, dtype=torch.float64)
    for now, after in zip(sigmas, sigmas[1:]):
        shift = step("flow_sde", mean, (mean - x0) / now, now, after, a, 0.96, noise=torch.zeros_like(x))
        nudge = step("flow_sde", mean + 1, (mean + 1 - x0) / now, now, after, a, 0.96, noise=torch.zeros_like(x))
        variance = variance * (nudge.mean - shift.mean) ** 2 + shift.std**2
        mean = shift.mean
    exact = step("exact", x, (x - x0) / s, s, n, a, 0.96, noise=torch.zeros_like(x))
    assert float(exact.mean) == pytest.approx(float(mean), abs=1e-4)
    assert float(exact.std) == pytest.approx(float(variance.sqrt()), abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), sigma=st.floats(0.05, 1.0), fall=st.floats(0.05, 0.95), level=st.floats(0.05, 0.95))
def test_scoring_a_sample_gives_its_own_log_prob(kind, sigma, fall, level):
    x, v, z = (
        torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    args = (kind, x, v, sigma, sigma * fall, level, 0.96)
    drawn = step(*args, noise=z, rho_min=0.3)
    scored = step(*args, next_latent=drawn.latent, rho_min=0.3)
    assert torch.equal(drawn.log_prob, scored.log_prob)
    if kind != "ode":
        gaussian = (
            torch.distributions.Normal(drawn.mean, drawn.std.expand_as(x)).log_prob(drawn.latent).flatten(1).mean(1)
        )
        torch.testing.assert_close(drawn.log_prob, gaussian)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["cps", "exact"]),
    sigma=st.floats(0.05, 1.0),
    fall=st.floats(0.05, 0.95),
    level=st.floats(0.05, 0.99),
)
def test_coefficient_preserving_steps_keep_the_noise_the_model_is_told(kind, sigma, fall, level):
    """With x0 known, the noise in the next latent has std sigma_next, whatever the level: tau^2 + (n rho)^2 = n^2."""
    n = sigma * fall
    x = torch.tensor([[0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0]], dtype=torch.float64)
    drawn = step(kind, x, v, sigma, n, level, 0.96, noise=torch.zeros_like(x))
    told = drawn.mean - (1 - n) * (x - sigma * v)  # n rho eh
    eh = x + (1 - sigma) * v
    if sigma < 0.999:
        assert float(drawn.std**2 + (told / eh) ** 2) == pytest.approx(n**2, rel=1e-9)
    assert float(drawn.std) <= n + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_is_the_euler_step(kind):
    x, v = INPUTS["x"], INPUTS["v"]
    quiet = step(kind, x, v, 0.7, 0.5, 0.0, 0.96)
    torch.testing.assert_close(quiet.latent, step("ode", x, v, 0.7, 0.5, 0.0, 0.96).latent, atol=1e-12, rtol=0)
    assert float(quiet.log_prob.abs().max()) == 0


def test_rows_of_a_batch_may_differ():
    x, v, z = INPUTS["x"], INPUTS["v"], INPUTS["eps"]
    sigma, sigma_next, level = torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.2]), torch.tensor([0.3, 0.7])
    for kind in KINDS:
        both = step(kind, x, v, sigma, sigma_next, level, 0.96, noise=z)
        for i in range(2):
            one = step(kind, x[i : i + 1], v[i : i + 1], sigma[i], sigma_next[i], level[i], 0.96, noise=z[i : i + 1])
            torch.testing.assert_close(both.latent[i : i + 1], one.latent)
            torch.testing.assert_close(both.log_prob[i : i + 1], one.log_prob)


def test_dtype_and_the_first_step_floor():
    assert (
        step("cps", INPUTS["x"].bfloat16(), INPUTS["v"].bfloat16(), 1.0, 0.9, 0.5, 0.9).log_prob.dtype == torch.float32
    )
    free = step("exact", INPUTS["x"], INPUTS["v"], 1.0, 0.96, 0.7, 0.96)
    floored = step("exact", INPUTS["x"], INPUTS["v"], 1.0, 0.96, 0.7, 0.96, rho_min=0.8)
    assert float(free.std) == pytest.approx(0.96) and float(floored.std) == pytest.approx(0.96 * math.sqrt(1 - 0.64))


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="Unknown step kind 'dpm'"):
        step("dpm", INPUTS["x"], INPUTS["v"], 1.0, 0.9, 0.5, 0.9)


@pytest.mark.parametrize("sigma", [0.99999994, 1 - 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sigma_that_is_1_but_for_rounding_is_1(kind, sigma):
    """ModelSamplingFlux's schedule begins so at 1088x1088 and others."""
    x, v, z = (INPUTS[name].float() for name in ("x", "v", "eps"))
    rounded, whole = (step(kind, x, v, s, 0.95, 0.7, 0.95, noise=z, rho_min=0.8) for s in (sigma, 1.0))
    torch.testing.assert_close(rounded.std, whole.std, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(rounded.latent, whole.latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rounded.log_prob, whole.log_prob, rtol=1e-4, atol=1e-5)
    scored = step(kind, x, v, sigma, 0.95, 0.7, 0.95, next_latent=rounded.latent, rho_min=0.8)
    assert torch.equal(scored.log_prob, rounded.log_prob)
