"""Krum, Multi-Krum, median, trimmed mean and Bulyan: by hand, against their definitions, and under attack."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import robust_literal as literal
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated import robust
from subspace_lab.methods.federated.robust import Bulyan, Krum, Median, RobustMethod, TrimmedMean

Function = Callable[[Tensor, int], Tensor]
RULES: dict[str, Function] = {
    "krum": lambda x, f: robust.krum(x, f),
    "multi_krum": lambda x, f: robust.krum(x, f, None),
    "median": lambda x, f: robust.median(x),
    "trimmed_mean": robust.trimmed_mean,
    "bulyan": robust.bulyan,
}
LITERAL = {
    "krum": literal.krum,
    "multi_krum": lambda v, f: literal.multi_krum(v, f, len(v) - f - 2),
    "median": lambda v, f: literal.median(v),
    "trimmed_mean": literal.trimmed_mean,
    "bulyan": literal.bulyan,
}


def honest(p: int, n: int, seed: int = 0, noise: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) + noise * torch.randn(p, n, generator=generator)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("p", "f"), [(7, 1), (8, 1), (11, 2), (15, 3), (15, 0), (20, 4)])
def test_a_rule_is_its_definition(rule: str, p: int, f: int) -> None:
    x = honest(p, 60, seed=p + f, noise=1.0)
    x[1] *= 5  # and something to be dropped
    expected = LITERAL[rule]([row.astype(np.float64) for row in x.numpy()], f)
    if rule == "bulyan" and f in (1, 2):  # its last choice has a tie by definition; without the tie:
        expected = bulyan_without_tie(x, f)
    torch.testing.assert_close(RULES[rule](x, f), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def bulyan_without_tie(x: Tensor, f: int) -> np.ndarray:
    """Of the definition's results for all orders the one whose last choice is nearer to all that were left."""
    vectors = [row.astype(np.float64) for row in x.numpy()]
    left, chosen = list(range(len(vectors))), []
    while len(chosen) < len(vectors) - 2 * f:
        scores = literal.krum_scores([vectors[i] for i in left], f)
        least = [i for i, score in zip(left, scores, strict=True) if score <= min(scores) * (1 + 1e-12)]
        reach = [sum(((vectors[i] - vectors[j]) ** 2).sum() for j in left) for i in least]
        chosen.append(least[int(np.argmin(reach))])
        left.remove(chosen[-1])
    rows = np.stack([vectors[i] for i in chosen])
    order = np.argsort(abs(rows - np.median(rows, axis=0)), axis=0)[: len(rows) - 2 * f]
    return np.take_along_axis(rows, order, axis=0).mean(axis=0)


def test_hand_made_cases() -> None:
    x = torch.tensor([[0.0, 9.0], [1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [100.0, -100.0]])
    assert robust.median(x).tolist() == [2.0, 7.0]
    assert robust.median(x[:4]).tolist() == [1.5, 7.5]
    assert robust.trimmed_mean(x, 1).tolist() == [2.0, 7.0]
    # f = 1: two nearest each. Scores 2 + 8, 2 + 2, 2 + 2, 2 + 8 on the line; a shift of row 3 leaves row 1 the best.
    x[3] = torch.tensor([3.5, 5.5])
    assert robust.krum(x, 1).tolist() == [1.0, 8.0]
    assert robust.krum(x, 1, 2).tolist() == [1.5, 7.5]
    # p = 7, f = 1: five choices without the two far away, of each coordinate the three nearest to the median 3.
    values = torch.tensor([[1.0], [2.0], [3.0], [5.0], [7.0], [1e6], [-1e6]])
    assert robust.bulyan(values, 1).tolist() == [
        2.0
    ]  # (1 + 2 + 3) / 3: 5 is as far as 1, and the lower window is first


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_does_not_matter(rule: str) -> None:
    for p, f in ((7, 1), (11, 2), (15, 3)):
        x = honest(p, 500, seed=f, noise=1.0)
        expected = RULES[rule](x, f)
        for seed in range(5):
            order = torch.randperm(p, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(RULES[rule](x[order], f), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [1e30, -1e8, float("nan"), float("inf")])
def test_f_of_p_attackers_destroy_the_mean_and_not_the_rule(rule: str, bad: float) -> None:
    f, x = 3, honest(15, 2000, seed=1)
    attacked = x.clone()
    attacked[:f] = bad
    centre = x[f:].mean(dim=0)
    mean = attacked.mean(dim=0)
    assert not (mean - centre).norm() < 1e3 * centre.norm()
    found = RULES[rule](attacked, f)
    # Not farther from the honest mean than an honest client is.
    assert (found - centre).norm() <= 1.05 * (x[f:] - centre).norm(dim=1).max()


@pytest.mark.parametrize("rule", RULES)
def test_one_attacker_too_many_breaks_what_can_be_broken(rule: str) -> None:
    p, f = 15, 3
    x = honest(p, 200, seed=2)
    liars = p // 2 + 1  # a majority that agrees
    x[:liars] = 1e3 + 1e-3 * torch.randn(liars, 200, generator=torch.Generator().manual_seed(3))
    assert (RULES[rule](x, f) - x[liars:].mean(dim=0)).norm() > 100


def test_large_blocks_and_small_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = honest(11, 1000, seed=4, noise=1.0)
    whole = {name: rule(x, 2) for name, rule in RULES.items()}
    monkeypatch.setitem(robust._BLOCK, "cpu", 7)
    for name, rule in RULES.items():
        torch.testing.assert_close(rule(x, 2), whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 9, 16, 31, 100])
def test_the_network_sorts(p: int) -> None:
    x = torch.randn(p, 300, generator=torch.Generator().manual_seed(p))
    assert torch.equal(torch.stack(robust.sort_rows(x)), x.sort(dim=0).values)


def test_without_declared_attackers_trimmed_mean_and_bulyan_are_the_mean() -> None:
    x = honest(9, 300, seed=5)
    torch.testing.assert_close(robust.trimmed_mean(x, 0), x.mean(dim=0))
    torch.testing.assert_close(robust.bulyan(x, 0), x.mean(dim=0))


@pytest.mark.parametrize(
    ("method", "enough", "hint"),
    [(Krum(f=3), 9, "f=2"), (TrimmedMean(f=3), 7, "f=2"), (Bulyan(f=3), 15, "f=2"), (Krum(f=0), 3, "more clients")],
)
def test_too_few_participants_are_refused(method: RobustMethod, enough: int, hint: str) -> None:
    method.check(enough)
    with pytest.raises(UserError, match=rf"method.f={method.f}: .* at least .* = {enough} .*{hint}"):
        method.check(enough - 1)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.f=-1"):
        TrimmedMean(f=-1)
    with pytest.raises(UserError, match=r"method\.m=0"):
        Krum(m=0)
    Krum(f=1, m=7).check(10)
    with pytest.raises(UserError, match=r"method\.m=8.*at most 7"):
        Krum(f=1, m=8).check(10)
    for wrong in (lambda: robust.krum(torch.zeros(4, 2), 1), lambda: robust.krum(torch.zeros(5, 2), 1, 3)):
        with pytest.raises(ValueError, match="it needs"):
            wrong()
    with pytest.raises(ValueError, match="p > 2 f"):
        robust.trimmed_mean(torch.zeros(4, 2), 2)
    with pytest.raises(ValueError, match="4 f"):
        robust.bulyan(torch.zeros(6, 2), 1)


def test_methods_are_the_functions() -> None:
    from subspace_lab.methods.federated.base import Round

    x, weights = honest(11, 40, seed=6), torch.full((11,), 1 / 11)
    about = Round(index=0, clients=tuple(range(11)), steps=(3,) * 11, lr=0.1, seed=0)
    arguments = (x, weights, [slice(0, 40)], about)
    assert torch.equal(Krum(f=2).aggregate(*arguments), robust.krum(x, 2))
    assert torch.equal(Krum(f=2, m=None).aggregate(*arguments), robust.krum(x, 2, 7))
    assert torch.equal(Median().aggregate(*arguments), robust.median(x))
    assert torch.equal(TrimmedMean(f=2).aggregate(*arguments), robust.trimmed_mean(x, 2))
    assert torch.equal(Bulyan(f=2).aggregate(*arguments), robust.bulyan(x, 2))
    assert all(method.needs_each for method in (Krum, Median, TrimmedMean, Bulyan))
