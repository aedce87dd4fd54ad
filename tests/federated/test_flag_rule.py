"""The Flag Aggregator: its invariances, its subspace against singular value decompositions, and under attack."""

from __future__ import annotations

import pytest
import torch
from reference import flag_literal as literal
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated.flag import Variant, flag, flag_coefficients
from subspace_lab.federated.robust import gram
from subspace_lab.methods.federated.base import Round
from subspace_lab.methods.federated.flag import Flag

VARIANTS: tuple[Variant, ...] = ("paper", "release")


def clients(p: int, n: int, seed: int = 0, noise: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.empty(p, 1).uniform_(-3, 1, generator=generator)
    return lengths * (torch.randn(n, generator=generator) + noise * torch.randn(p, n, generator=generator))


@pytest.mark.parametrize("pairwise", [0.0, 1.0, 20.0])
@pytest.mark.parametrize(("p", "r"), [(7, 4), (9, 5), (5, 1), (6, 6)])
def test_reweighting_in_the_gram_matrix_is_that_of_the_vectors(p: int, r: int, pairwise: float) -> None:
    g = clients(p, 120, seed=p)
    Y = literal.subspace(g, r, pairwise, iterations=60)
    expected = literal.combine(g, Y).float()
    found = flag(g, r, pairwise)
    assert (found - expected).norm() <= 2e-4 * expected.norm()
    units = [row / row.norm() for row in g.double()]
    start = literal.objective(units, literal.subspace(g, r, pairwise, iterations=1), pairwise)
    # Something was gained on the way, or the test would pass without any reweighting.
    if r < p:
        assert literal.objective(units, Y, pairwise) < start - 1e-3
        assert (found - flag(g, r, pairwise, "release")).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("pairwise", [0.0, 20.0])
def test_release_is_one_step_from_a_random_subspace(pairwise: float) -> None:
    g = clients(7, 40_000, seed=1)
    for seed in range(2):
        expected = literal.combine(g, literal.released_subspace(g, 4, pairwise, seed)).float()
        assert (flag(g, 4, pairwise, "release") - expected).norm() <= 1e-3 * expected.norm()


def test_the_default_dimension_is_half_of_the_clients_and_one_half() -> None:
    for p, r in ((1, 1), (4, 2), (7, 4), (15, 8)):
        g = clients(p, 60, seed=p)
        assert torch.equal(flag(g), flag(g, r))
    assert not torch.allclose(flag(g), flag(g, 7))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pairwise", [0.0, 5.0])
def test_order_and_lengths_of_the_updates_do_not_matter(variant: Variant, pairwise: float) -> None:
    g = clients(15, 300, seed=2)
    expected = flag(g, None, pairwise, variant)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        order = torch.randperm(15, generator=generator)
        lengths = 10 ** torch.empty(15, 1).uniform_(-6, 6, generator=generator)
        torch.testing.assert_close(flag(g[order] * lengths, None, pairwise, variant), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(flag(-g, None, pairwise, variant), -expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_update_becomes_a_unit_vector(variant: Variant) -> None:
    g = 37.5 * clients(1, 50)
    torch.testing.assert_close(flag(g, 1, 0.0, variant)[None], g / g.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_span_gives_the_sum_of_all_directions(variant: Variant) -> None:
    g = clients(6, 80, seed=4)
    torch.testing.assert_close(flag(g, 6, 0.0, variant), (g / g.norm(dim=1, keepdim=True)).sum(dim=0) / 6)


def test_the_subspace_reconstructs_a_common_plane() -> None:
    """Nine clients in a plane and six elsewhere: r = 2 finds the plane, whatever the others say."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(200, 2, generator=generator))[0]
    plane = torch.randn(9, 2, generator=generator) @ basis.T
    others = 100 * torch.randn(6, 200, generator=generator)
    found = flag(torch.cat([others, plane]), 2)
    assert (found - basis @ (basis.T @ found)).norm() <= 1e-3 * found.norm()
    within = sum(basis @ (basis.T @ (x / x.norm())) for x in torch.cat([others, plane])) / 2
    assert (found - within).norm() <= 5e-3 * within.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("f", [1, 2, 3])
def test_f_of_fifteen_attackers_destroy_the_mean_and_not_the_direction(variant: Variant, f: int) -> None:
    g = clients(15, 5000, seed=6)
    centre = (g[f:] / g[f:].norm(dim=1, keepdim=True)).mean(dim=0)
    for bad in (1e20 * torch.rand(f, 5000, generator=torch.Generator().manual_seed(7)), -1e6 * g[:f]):
        attacked = torch.cat([bad, g[f:]])
        assert torch.cosine_similarity(attacked.mean(dim=0), centre, dim=0) < 0.2
        assert torch.cosine_similarity(flag(attacked, None, 0.0, variant), centre, dim=0) > 0.85


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pairwise", [0.0, 2.0])
def test_broken_silent_and_repeated_updates(variant: Variant, pairwise: float) -> None:
    g = clients(9, 100, seed=8)
    g[0], g[1], g[2, 3], g[4] = 0, float("nan"), float("inf"), g[3]
    found = flag(g, 4, pairwise, variant)
    assert found.isfinite().all() and found.norm() > 0.1
    good = gram(torch.cat([g[3:]]))
    if not pairwise:  # without pairs those left out leave no trace; r stays what it was asked to be
        torch.testing.assert_close(found, flag_coefficients(good, 4, 0.0, variant).float() @ g[3:], rtol=0, atol=1e-5)
    assert not flag(torch.zeros(3, 10)).any()


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        flag(torch.ones(3, 5), 4)
    with pytest.raises(UserError, match=r"method\.r=0"):
        Flag(r=0)
    with pytest.raises(UserError, match=r"method\.pairwise=-1"):
        Flag(pairwise=-1)
    Flag(r=10).check(10)
    with pytest.raises(UserError, match=r"method\.r=11: 10 participants.*null takes 5"):
        Flag(r=11).check(10)


def test_the_method_is_the_function() -> None:
    g = clients(5, 30)
    about = Round(index=0, clients=tuple(range(5)), steps=(1,) * 5, lr=0.1, seed=0)
    method = Flag(r=2, pairwise=3.0, variant="release")
    assert torch.equal(method.aggregate(g, torch.full((5,), 0.2), [slice(0, 30)], about), flag(g, 2, 3.0, "release"))
    assert method.server_lr == 0.2 and method.needs_each
