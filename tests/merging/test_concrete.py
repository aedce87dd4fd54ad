"""Concrete subspace learning: the contract, equality with loops, the mask's distribution, what survives saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from contracts.merging import MergeContract
from contracts.merging_workshop import workshop
from reference.merging_adaptive_literal import State as Tensors
from reference.merging_adaptive_literal import literal_adamerging, literal_mask
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.merging import Merge, merge_state_dicts
from subspace_lab.merging.concrete import Concrete, EvalMask, relaxed, rescaled
from subspace_lab.merging.entropy import TestEntropy
from subspace_lab.merging.learning import draw_seed
from subspace_lab.merging.task_vectors import TaskVectors
from subspace_lab.merging.workshop import Workshop

State = Mapping[str, Tensor]


class TestConcreteContract(MergeContract):
    @override
    def build(self) -> Concrete:
        return Concrete()

    @override
    def prepare(self, method: Merge, base: State, models: Sequence[State]) -> None:
        assert isinstance(method, Concrete)
        state: dict[str, Tensor] = {"seed": torch.tensor(3)}
        for name, W0 in base.items():
            if W0.is_floating_point():
                state[f"logits/{name}"] = 5 * W0.detach().float().contiguous()
                state[f"coefficients/{name}"] = torch.full((len(models),), 0.3)
        method.load_state_dict(state)


def parts(shop: Workshop) -> tuple[Tensors, list[Tensors]]:
    base = {name: W for name, W in shop.base.items() if W.is_floating_point()}
    return base, [{name: model[name] - W for name, W in base.items()} for model in shop.models]


def noises(shop: Workshop, base: Tensors) -> Iterator[Tensors]:
    """What the method draws, tensor by tensor."""
    generator = torch.Generator().manual_seed(derive_key("concrete/1", shop.seed))
    sizes = [W.numel() for W in base.values()]
    while True:
        flat = torch.rand(sum(sizes), generator=generator).split(sizes)
        yield {name: u.view(W.shape).double() for (name, W), u in zip(base.items(), flat, strict=True)}


@pytest.mark.parametrize("inner", [None, True, False], ids=["task_arithmetic", "clamped", "not_clamped"])
def test_equals_loops_over_tasks_and_tensors(inner: bool | None) -> None:
    shop = workshop(dtype=torch.float64)
    base, deltas = parts(shop)
    method = Concrete(
        inner="none" if inner is None else "first_order",
        lr=0.05,
        steps=5,
        inner_lr=0.2,
        clamp=bool(inner),
        adapt_steps=4,
        adapt_lr=0.02,
        batch_size=8,
    )
    method.learn(shop)
    streams = [task.draw("test", 8, draw_seed(shop, "concrete", t)) for t, task in enumerate(shop.tasks)]
    heads = [task.head for task in shop.tasks]
    logits = literal_mask(
        shop.model,
        base,
        deltas,
        heads,
        streams,
        noises(shop, base),
        scale=0.3,
        temperature=0.5,
        lr=0.05,
        steps=5,
        inner_lr=None if inner is None else 0.2,
        clamp=bool(inner),
    )
    state = method.state_dict()
    for name, x in logits.items():
        torch.testing.assert_close(state[f"logits/{name}"].double(), x, rtol=0, atol=1e-3)
    moved = torch.cat([x.flatten() for x in logits.values()]).abs()
    assert moved.max() > 0.15
    merged = merge_state_dicts(method, shop.base, shop.models)
    # The mask that the method drew, for the rest to be compared in full precision.
    masks = {name: method._masks[name].double() for name in base}
    used = torch.full((3, len(base)), 0.3, dtype=torch.float64)
    if inner is not None:
        used = literal_adamerging(
            shop.model,
            base,
            deltas,
            heads,
            streams,
            start=0.3,
            lr=0.02,
            steps=4,
            batches=1,
            clamp=inner,
            masks=masks,
        )
        assert (used - 0.3).abs().max() > 0.02
    for k, (name, W) in enumerate(base.items()):
        expected = W + masks[name] * sum(used[t, k] * D[name] for t, D in enumerate(deltas))
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)


def test_the_mask_is_a_relaxed_bernoulli_variable() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200_000, generator=generator)
    m = relaxed(noise.double(), torch.zeros(()), 0.5)
    assert m.min() > 0
    assert m.max() < 1
    assert float(m.mean()) == pytest.approx(0.5, abs=3e-3)
    assert float(m.var()) == pytest.approx(0.143, abs=2e-3)
    x = torch.tensor(1.3)
    sharp = relaxed(noise, x, 1e-3)
    assert float(((sharp < 1e-3) | (sharp > 1 - 1e-3)).float().mean()) > 0.995
    assert float(sharp.mean()) == pytest.approx(float(torch.sigmoid(x)), abs=4e-3)
    for extreme in (torch.tensor([0.0]), torch.tensor([1.0])):
        assert torch.isfinite(relaxed(extreme, x, 0.5)).all()
    again = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=x.expand(200_000)).sample()
    mine = relaxed(noise, x, 0.5)
    quantiles = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(mine.quantile(quantiles), again.quantile(quantiles), rtol=0, atol=8e-3)


def test_every_mask_has_mean_1_and_one_gradient_through_it() -> None:
    m = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert float(rescaled([m])[0].mean().detach()) == pytest.approx(1)
    assert torch.autograd.gradcheck(lambda values: rescaled([values])[0], (m,))
    # A constant factor of a mask is divided out: no gradient along the mask itself.
    (g,) = torch.autograd.grad(rescaled([m])[0].square().sum(), m)
    assert float((g * m).sum().detach()) == pytest.approx(0, abs=1e-12)
    assert torch.equal(rescaled([torch.zeros(3)])[0], torch.zeros(3))


@pytest.mark.parametrize("eval_mask", ["sampled", "expected", "discrete"])
def test_kinds_of_evaluation_mask(eval_mask: EvalMask) -> None:
    shop = workshop()
    method = Concrete(steps=3, lr=0.5, eval_mask=eval_mask)
    method.learn(shop)
    state = method.state_dict()
    merged = merge_state_dicts(method, shop.base, shop.models)
    base, deltas = parts(shop)
    for name in ("up.weight", "qkv.weight"):
        mask = ((merged[name] - base[name]) / (0.3 * sum(D[name] for D in deltas))).flatten()
        assert float(mask.mean()) == pytest.approx(1, abs=1e-2)
        p = torch.sigmoid(state[f"logits/{name}"]).flatten()
        if eval_mask == "expected":
            torch.testing.assert_close(mask, p / p.mean(), rtol=1e-2, atol=1e-2)
        elif eval_mask == "discrete":
            share = (mask > 0.5).float().mean()
            assert float(share) == pytest.approx(float(p.mean()), abs=4 * 0.5 / len(p) ** 0.5)
            assert ((mask.abs() < 1e-2) | ((mask * share - 1).abs() < 2e-2)).all()
        else:
            assert mask.unique().numel() > 0.9 * len(mask)


def test_before_any_step_it_is_about_task_arithmetic_and_learning_lowers_the_entropy() -> None:
    lines: list[str] = []
    shop = workshop(tell=lines.append, steps=40)
    vectors = TaskVectors(shop)
    arithmetic = vectors.merged(torch.full((3, 1), 0.3))

    def entropy(weights: Mapping[str, Tensor]) -> float:
        found = TestEntropy(shop, 8, "x").predictions({n: W for n, W in weights.items() if W.is_floating_point()})
        return sum(p.entropy for p in found)

    results = []
    for steps in (0, 60):
        method = Concrete(steps=steps, lr=0.1, eval_mask="expected")
        method.learn(shop)
        results.append(entropy(merge_state_dicts(method, shop.base, shop.models)))
    assert results[0] == pytest.approx(entropy(arithmetic), abs=1e-4)  # all of σ(x) is 1/2
    assert results[1] < results[0] - 0.05
    assert any("mask: step 60 of 60" in line for line in lines)
    probability = method.learned()["mask_probability"]
    assert probability["deviation"] > 0.05
    assert method.learned()["predictions"]["task0"].keys() >= {"entropy_before", "marginals_after"}


def test_a_hundred_merges_leave_the_workshop_untouched() -> None:
    shop = workshop(tasks=2, steps=3)
    found = [shop.base, *shop.models, shop.model.state_dict()]
    before = [{name: W.clone() for name, W in state.items()} for state in found]
    method = Concrete(inner="first_order", steps=25, adapt_steps=50, batch_size=2)
    method.learn(shop)
    for _ in range(100):
        merge_state_dicts(method, shop.base, shop.models)
    for state, old in zip([shop.base, *shop.models, shop.model.state_dict()], before, strict=True):
        assert all(torch.equal(W, old[name]) for name, W in state.items())
    assert not any(p.grad is not None or p.requires_grad for p in shop.model.parameters())


@pytest.mark.parametrize("eval_mask", ["sampled", "discrete"])
def test_state_survives_and_the_seed_decides(eval_mask: EvalMask) -> None:
    results = []
    for seed in (0, 0, 1):
        shop = workshop(seed=seed)
        method = Concrete(inner="first_order", steps=3, adapt_steps=2, eval_mask=eval_mask)
        method.learn(shop)
        other = Concrete(eval_mask=eval_mask)
        other.load_state_dict(method.state_dict())
        results.append(merge_state_dicts(method, shop.base, shop.models))
        again = merge_state_dicts(other, shop.base, shop.models)
        assert all(torch.equal(again[name], W) for name, W in results[-1].items())
    assert all(torch.equal(results[0][name], W) for name, W in results[1].items())
    assert not torch.equal(results[0]["up.weight"], results[2]["up.weight"])


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"lr": -1}, {"steps": -1}, {"adapt_steps": -1}, {"inner_lr": 0}, {"adapt_lr": 0}]
)
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Concrete(**options)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_on_cuda_base_and_models_stay_and_masks_are_the_same() -> None:
    shop = workshop(device="cuda")
    before = {name: W.clone() for name, W in shop.base.items()}
    method = Concrete(inner="first_order", steps=3, adapt_steps=2)
    method.learn(shop)
    assert all(torch.equal(before[name], W) for name, W in shop.base.items())
    there = merge_state_dicts(method, shop.base, shop.models)
    other = Concrete()
    other.load_state_dict({name: value.cpu() for name, value in method.state_dict().items()})
    here = merge_state_dicts(
        other, {n: W.cpu() for n, W in shop.base.items()}, [{n: W.cpu() for n, W in m.items()} for m in shop.models]
    )
    for name, W in here.items():
        torch.testing.assert_close(there[name].cpu(), W, rtol=1e-5, atol=1e-6)
