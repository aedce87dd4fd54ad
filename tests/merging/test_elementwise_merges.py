"""Average, task arithmetic, TIES, DARE, SLERP: equality with the papers written out, and what always holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import merging_elementwise_literal as literal
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, random_bits
from subspace_lab.linalg.random_words import bernoulli, random_words
from subspace_lab.merging import Merge, grouping, merge_state_dicts, ties
from subspace_lab.merging.averaging import SimpleAverage, TaskArithmetic
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.in_memory import update_state_dicts
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES

State = dict[str, Tensor]
SHAPES = {"a.weight": (90, 80), "b.weight": (40, 30), "c.bias": (30,), "d": (3, 5, 7)}


def models(
    count: int, size: float = 0.05, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}
    # Heavy tails and different widths: thresholds of tensors and of the model differ.
    tuned = [
        {
            name: (W.double() + size * (1 + i) * torch.randn(W.shape, generator=g, dtype=torch.float64) ** 3).to(dtype)
            for i, (name, W) in enumerate(base.items())
        }
        for _ in range(count)
    ]
    return base, tuned


def flat(state: State) -> Any:
    return torch.cat([W.flatten() for W in state.values()]).double().numpy()


def deltas(base: State, tuned: list[State]) -> list[State]:
    return [{name: W[name].double() - base[name].double() for name in base} for W in tuned]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces even of small tensors."""
    monkeypatch.setattr(grouping, "_PIECE", 1 << 13)
    monkeypatch.setattr(ties, "_SORTED", 1 << 11)  # and counting, not sorting, for most of them


def test_task_arithmetic_and_the_average_equal_their_definitions() -> None:
    base, tuned = models(5)
    expected = literal.task_arithmetic(flat(base), [flat(W) for W in tuned], 0.3)
    found = flat(merge_state_dicts(TaskArithmetic(0.3), base, tuned))
    assert np.linalg.norm(found - expected) <= 3e-7 * np.linalg.norm(expected)
    average = flat(merge_state_dicts(SimpleAverage(), base, tuned))
    np.testing.assert_allclose(average, flat(merge_state_dicts(TaskArithmetic(1 / 5), base, tuned)), rtol=0, atol=2e-6)
    np.testing.assert_allclose(average, np.mean([flat(W) for W in tuned], axis=0), rtol=0, atol=2e-6)
    # Without a base the first model stands in for it.
    other = flat(merge_state_dicts(SimpleAverage(), tuned[0], tuned))
    np.testing.assert_allclose(other, average, rtol=0, atol=2e-6)


def test_one_model_with_scale_1_is_that_model() -> None:
    base, tuned = models(1, size=1e-3)
    for method in (TaskArithmetic(1.0), TIES(1.0, density=1.0), DARE(1.0, p=0.0)):
        merged = merge_state_dicts(method, base, tuned)
        for name, W in merged.items():
            assert torch.allclose(W, tuned[0][name], rtol=2e-7, atol=1e-7), name


def test_what_nobody_trained_stays_bit_for_bit() -> None:
    base, tuned = models(7)
    for W in tuned:
        W["a.weight"] = base["a.weight"].clone()
    methods: list[Merge] = [SimpleAverage(), TaskArithmetic(0.37), TIES(), DARE()]
    for method in methods:
        assert torch.equal(merge_state_dicts(method, base, tuned)["a.weight"], base["a.weight"]), method


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.2, 0.01, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_ties_equals_the_paper_with_one_threshold_for_the_whole_model(density: float, combine: Any, dtype: Any) -> None:
    base, tuned = models(4, dtype=dtype)
    # The float32 differences themselves are what both trim: the threshold falls between the same two entries.
    D = [flat({n: (W[n] - base[n]) for n in base}) for W in tuned]
    expected = literal.ties(D, density, combine)
    method = TIES(1.0, density, combine=combine)
    found = flat(update_state_dicts(method, base, tuned))
    wrong = np.abs(found - expected) > 1e-6 * np.abs(expected).max()
    assert wrong.mean() <= (1e-5 if dtype == torch.float32 else 0)
    if density < 1:
        more = method.metrics()["density"] * len(expected) - math.floor(density * len(expected))
        assert -1e-6 <= more <= 3  # entries as large as the smallest that is kept; rounding makes a few of them


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_by_tensor_equals_the_paper_on_each_tensor(combine: Any) -> None:
    base, tuned = models(3)
    U = update_state_dicts(TIES(1.0, 0.3, trim="tensor", combine=combine), base, tuned)
    for name in base:
        D = [(W[name] - base[name]).double().flatten().numpy() for W in tuned]
        expected = literal.ties(D, 0.3, combine)
        wrong = np.abs(U[name].double().flatten().numpy() - expected) > 1e-6 * np.abs(expected).max()
        assert wrong.sum() == 0, name
    # One threshold for all keeps more of the tensors that changed more.
    other = update_state_dicts(TIES(1.0, 0.3, combine=combine), base, tuned)
    assert (other["a.weight"] != 0).float().mean() < (U["a.weight"] != 0).float().mean()


def test_every_result_of_ties_has_the_elected_sign() -> None:
    base, tuned = models(5)
    U = flat(update_state_dicts(TIES(density=0.5), base, tuned))
    D = [flat({name: W[name] - base[name] for name in base}) for W in tuned]
    total = sum(np.where(np.abs(d) >= np.sort(np.abs(d))[-(len(d) // 2)], d, 0) for d in D)
    clear = np.abs(total) > 1e-5 * np.abs(total).max()
    assert clear.mean() > 0.5
    assert (np.sign(U)[clear] == np.sign(total)[clear]).all()


def test_ties_counts_what_is_kept_of_a_mostly_unchanged_model() -> None:
    """With more zeros than are trimmed the threshold is 0, and zeros do not count as kept."""
    base, tuned = models(2)
    for W in tuned:
        for name in ("a.weight", "d"):
            W[name] = base[name].clone()
    method = TIES(density=0.5)
    U = update_state_dicts(method, base, tuned)
    changed = np.mean([(flat(d) != 0).mean() for d in deltas(base, tuned)])
    assert method.metrics()["density"] == pytest.approx(changed)
    assert changed < 0.2
    assert not U["a.weight"].any()
    expected = literal.ties([flat(d) for d in deltas(base, tuned)], 1.0, "mean")
    np.testing.assert_allclose(flat(U), expected, rtol=0, atol=1e-6)


def test_ties_keeps_every_one_of_equal_magnitudes_at_the_threshold() -> None:
    base = {"w": torch.zeros(300, 300)}
    W = torch.ones(300, 300)
    W[:100] = -2
    W[100:200] = 0.5
    method = TIES(density=0.4)  # the 40 % end within the ones
    U = update_state_dicts(method, base, [{"w": W}])
    assert method.metrics()["density"] == pytest.approx(2 / 3)
    assert torch.equal(U["w"], torch.where(W.abs() >= 1, W, 0.0))


def test_words_are_those_of_the_shared_generator() -> None:
    for key, start, count in ((0, 0, 1000), (2**63 - 5, 12345, 777), (7, 2**32 - 3, 10), (9, 5 * 2**32 + 1, 50)):
        words = random_words(key, start, count)
        assert words.dtype == torch.int32
        assert torch.equal(words.long() % 2**32, random_bits(key, start, count)), (key, start)
        u = random_bits(key, start, count).double() / 2**32
        for p in (0.0, 0.25, 0.5, 0.9, 1.0):
            assert torch.equal(bernoulli(key, start, count, p), u < p), p


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_equals_the_paper_with_the_same_draws(p: float, rescale: Any) -> None:
    base, tuned = models(3)
    U = update_state_dicts(DARE(p=p, rescale=rescale, seed=4), base, tuned)
    for name, W in base.items():
        dropped = [
            (random_bits(derive_key("dare", 4, t, name), 0, W.numel()).double() / 2**32 < p).numpy() for t in range(3)
        ]
        D = [d[name].flatten().numpy() for d in deltas(base, tuned)]
        expected = literal.dare(D, dropped, p, rescale)
        np.testing.assert_allclose(U[name].double().flatten().numpy(), expected, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_dare_drops_the_right_share_and_keeps_the_mean(p: float) -> None:
    n = 200_000
    base, tuned = {"w": torch.zeros(n)}, [{"w": torch.ones(n)}]
    draws = torch.stack([update_state_dicts(DARE(p=p, seed=seed), base, tuned)["w"] for seed in range(5)])
    kept = (draws != 0).float().mean(1)
    assert (kept - (1 - p)).abs().max() <= 4 * math.sqrt(p * (1 - p) / n)
    assert draws.mean() == pytest.approx(1, abs=4 * math.sqrt(p / (1 - p) / draws.numel()))
    assert draws.square().mean() == pytest.approx(1 / (1 - p), rel=0.02)
    # Seeds, models and tensors draw independently.
    both = ((draws[0] != 0) & (draws[1] != 0)).float().mean()
    assert both == pytest.approx((1 - p) ** 2, abs=4 * math.sqrt(1 / n))
    U = update_state_dicts(
        DARE(p=p), {"w": torch.zeros(n), "v": torch.zeros(n)}, [{"w": torch.ones(n), "v": torch.ones(n)}] * 2
    )
    assert not torch.equal(U["w"], U["v"])
    assert ((U["w"] - 1 / (1 - p)).abs() < 1e-4).float().mean() == pytest.approx(2 * p * (1 - p), abs=4 / math.sqrt(n))


def test_dare_draws_the_same_however_tensors_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = models(3)
    cut = merge_state_dicts(DARE(seed=1), base, tuned)
    monkeypatch.setattr(grouping, "_PIECE", 1 << 20)
    whole = merge_state_dicts(
        DARE(seed=1), dict(reversed(base.items())), tuned, rules=TensorRules(split_fused_qkv=True)
    )
    assert all(torch.equal(cut[name], whole[name]) for name in base)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_equals_its_formula(t: float) -> None:
    base, _ = models(0)
    _, tuned = models(2, size=0.3, seed=5)
    tuned[1]["c.bias"] = tuned[0]["c.bias"] * 1.01  # parallel: the line
    method = SLERP(t)
    merged = merge_state_dicts(method, base, tuned)
    for name in base:
        a, b = (W[name].double().flatten().numpy() for W in tuned)
        np.testing.assert_allclose(
            merged[name].double().flatten().numpy(), literal.slerp(a, b, t), rtol=3e-7, atol=4e-6
        )
    if t in (0.0, 1.0):
        assert all(torch.allclose(merged[name], tuned[int(t)][name], rtol=0, atol=2e-6) for name in base)
    else:
        assert method.metrics() == {"arcs": 3, "lines": 1}


def test_slerp_stays_on_the_sphere_and_is_symmetric() -> None:
    g = torch.Generator().manual_seed(3)
    pair = [{"w": (W := torch.randn(50, 60, generator=g)) / W.norm()} for _ in range(2)]
    merged = merge_state_dicts(SLERP(0.2), pair[0], pair)["w"]
    assert merged.norm() == pytest.approx(1, abs=1e-6)
    assert merge_state_dicts(TaskArithmetic(0.2), pair[0], pair[1:])["w"].norm() < 0.9
    turned = merge_state_dicts(SLERP(0.8), pair[1], pair[::-1])["w"]
    assert torch.allclose(merged, turned, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TIES(density=0.0), "method.density must be above 0 and at most 1, got 0.0"),
        (lambda: TIES(density=1.5), "got 1.5"),
        (lambda: DARE(p=1.0), "method.p must be at least 0 and below 1"),
        (lambda: DARE(p=-0.1), "method.p"),
        (lambda: SLERP(1.2), "method.t must be between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(build: Callable[[], Merge], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build()


@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize(
    "method", [TaskArithmetic(), TIES(), DARE(), TIES(trim="tensor")], ids=lambda m: type(m).__name__
)
def test_values_that_are_not_finite_are_named(method: Merge, where: str) -> None:
    base, tuned = models(3)
    (base if where == "base" else tuned[1])["b.weight"][3, 4] = math.nan if where == "base" else math.inf
    who = "the base" if where == "base" else "model svhn"
    with pytest.raises(UserError, match=f"tensor b.weight of {who} has 1 values that are not finite"):
        merge_state_dicts(method, base, tuned, labels=["mnist", "svhn", "usps"])
