"""Whatever the input: finite numbers from the maths, and prompts or one clear error from the loaders."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import guard
import rewards
from scorers import geneval

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("fast")

kinds = st.sampled_from(["flow", "dance", "cps"])
methods = st.sampled_from(guard.METHODS)
etas = st.floats(0.01, 1)
values = st.floats(-100, 100, width=32)


@st.composite
def sigma_pairs(draw):
    """1 >= sigma > sigma_next >= 0, as far apart as two steps of any real schedule."""
    sigma = draw(st.one_of(st.just(1.0), st.floats(1e-3, 1 - 1e-6)))
    sigma_next = draw(st.one_of(st.just(0.0), st.floats(0, sigma * 0.999)))
    return sigma, sigma_next


@given(sigma_pairs(), st.one_of(st.just(0.0), etas), kinds)
def test_coefficients_are_finite_and_a_step_goes_forward(pair, eta, kind):
    a, b, s = guard.sde_coefficients(*pair, eta, kind)
    assert all(math.isfinite(value) for value in (a, b, s))
    assert s >= 0 and (s == 0) == (eta == 0 or pair[1] == 0)
    if eta == 0 or pair[1] == 0:
        assert (a, b) == (1.0, pair[1] - pair[0])


@given(sigma_pairs(), etas, kinds)
def test_cps_and_the_ode_keep_the_noise_level(pair, eta, kind):
    """From x = (1 - sigma) x0 + sigma x1 with the true velocity, the image's share becomes 1 - sigma_next."""
    sigma, sigma_next = pair
    a, b, _ = guard.sde_coefficients(sigma, sigma_next, eta if kind == "cps" else 0.0, kind)
    assert a * (1 - sigma) - b == pytest.approx(1 - sigma_next, abs=1e-9)


@given(sigma_pairs().filter(lambda pair: pair[1] > 1e-3), etas, kinds, methods, st.lists(values, min_size=12))
def test_ratios_and_objectives_are_finite(pair, eta, kind, method, numbers):
    step = guard.schedule(list(pair), eta, kind)[0]
    size = len(numbers) // 3
    v_new, v_old, eps = torch.tensor(numbers[: 3 * size], dtype=torch.float64).view(3, 1, size)
    log_ratio = guard.log_ratio(v_new, v_old, eps / 100, step.b, step.s, method)
    assert log_ratio.shape == (1,) and log_ratio.isfinite()
    assert guard.log_ratio(v_old, v_old, eps, step.b, step.s, method) == 0
    delta = guard.reweighting(step, eta, kind, method)
    assert math.isfinite(delta) and delta > 0
    rho = torch.expm1(log_ratio.clamp(max=700))
    objective = guard.surrogate(rho, torch.ones(1), 1e-4, delta)
    assert objective.isfinite() and objective <= delta * 1e-4 * (1 + 1e-12)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_finite_bounded_and_rank_as_the_rewards_do(groups):
    scores = torch.tensor(groups, dtype=torch.float64)
    A = guard.advantages(scores)
    assert A.isfinite().all() and A.abs().max() <= 5
    for row, of_row in zip(scores, A, strict=True):
        order = row.argsort()
        assert (of_row[order].diff() >= -1e-9).all()


def either_prompts_or_one_line(path, names):
    try:
        prompts = rewards.read_prompts(path, names)
    except rewards.BadInput as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert prompts and all(prompt.strip() and isinstance(about, dict) for prompt, about in prompts)


names_of_rewards = st.sampled_from([(), ("ocr",), ("cards-frame", "ocr")])


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)), names_of_rewards)
def test_any_bytes_are_prompts_or_one_clear_error(tmp_path_factory, content, names):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    either_prompts_or_one_line(path, names)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 20), st.text(max_size=8), st.just("red")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
clauses = st.fixed_dictionaries(
    {"class": st.one_of(st.sampled_from(geneval.CLASSES[:4]), json_values), "count": json_values},
    optional={"color": json_values, "position": json_values},
)
metadata = st.fixed_dictionaries(
    {"prompt": st.one_of(st.text(min_size=1, max_size=20), json_values)},
    optional={"include": st.one_of(st.lists(clauses, max_size=3), json_values), "tag": json_values},
)


@given(st.lists(st.one_of(metadata, json_values), min_size=1, max_size=4))
def test_any_metadata_is_prompts_or_one_clear_error(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    either_prompts_or_one_line(path, ["geneval"])
