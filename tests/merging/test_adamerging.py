"""AdaMerging: the contract, equality with loops over copies, gradients by finite differences, entropy, collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from contracts.merging import MergeContract
from contracts.merging_workshop import workshop
from reference.merging_adaptive_literal import literal_adamerging
from torch import Tensor
from typing_extensions import override

from subspace_lab import interrupt
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.merging import Merge, merge_state_dicts
from subspace_lab.merging import entropy as entropy_module
from subspace_lab.merging.adamerging import AdaMerging
from subspace_lab.merging.coefficients import Wise
from subspace_lab.merging.concrete import Concrete
from subspace_lab.merging.entropy import TestEntropy
from subspace_lab.merging.fisher import Fisher
from subspace_lab.merging.learning import draw_seed
from subspace_lab.merging.regmean import RegMean
from subspace_lab.merging.task_vectors import TaskVectors
from subspace_lab.merging.workshop import Part, Workshop

State = Mapping[str, Tensor]


class TestAdaMergingContract(MergeContract):
    @override
    def build(self) -> AdaMerging:
        return AdaMerging()

    @override
    def prepare(self, method: Merge, base: State, models: Sequence[State]) -> None:
        assert isinstance(method, AdaMerging)
        state = {}
        for name, W0 in base.items():
            if W0.is_floating_point():
                deltas = [(found[name].detach().float() - W0.detach().float()).contiguous() for found in models]
                state[f"coefficients/{name}"] = torch.stack([0.3 + 0.1 * torch.tanh(D.sum()) for D in deltas]).cpu()
        method.load_state_dict(state)


def parts(shop: Workshop) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {name: W for name, W in shop.base.items() if W.is_floating_point()}
    return base, [{name: model[name] - W for name, W in base.items()} for model in shop.models]


@pytest.mark.parametrize(
    ("wise", "clamp", "batches", "start"),
    [("layer", True, 2, 0.3), ("layer", False, 1, 0.3), ("task", True, 2, 0.03), ("layer", True, 1, 0.97)],
    ids=["release", "fusionbench", "task_wise", "clamped"],
)
def test_equals_loops_over_tasks_and_tensors(wise: Wise, clamp: bool, batches: int, start: float) -> None:
    shop = workshop(dtype=torch.float64)
    base, deltas = parts(shop)
    method = AdaMerging(wise=wise, clamp=clamp, batches=batches, initial=start, lr=0.02, steps=6, batch_size=8)
    method.learn(shop)
    streams = [task.draw("test", 8, draw_seed(shop, "adamerging", t)) for t, task in enumerate(shop.tasks)]
    expected = literal_adamerging(
        shop.model,
        base,
        deltas,
        [task.head for task in shop.tasks],
        streams,
        start=start,
        lr=0.02,
        steps=6,
        batches=batches,
        clamp=clamp,
        task_wise=wise == "task",
    )
    found = torch.stack([method.state_dict()[f"coefficients/{name}"] for name in base], dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert (found - start).abs().max() > 0.02
    if clamp:
        assert found.min() >= 0
        assert found.max() <= 1
    merged = merge_state_dicts(method, shop.base, shop.models)
    for k, name in enumerate(base):
        W = base[name] + sum(expected[t, k] * D[name] for t, D in enumerate(deltas))
        torch.testing.assert_close(merged[name], W, rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [1, 1 << 22])
def test_gradient_of_coefficients_is_that_of_finite_differences(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy_module, "_TOGETHER", together)
    shop = workshop(dtype=torch.float64)
    vectors = TaskVectors(shop)
    K = len(vectors.names)
    start = 0.3 + 0.05 * torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def value(at: Tensor) -> Tensor:
        return TestEntropy(shop, 8, "here", 2).backward(vectors.merged(at)).sum()

    at = start.clone().requires_grad_()
    value(at)
    gradient = at.grad
    assert gradient is not None
    step = 1e-3
    for t, k in [
        (0, 0),
        (1, 2),
        (2, vectors.names.index("down.weight")),
        (1, vectors.names.index("norm.bias")),
    ]:
        move = torch.zeros_like(start)
        move[t, k] = step
        leaf = [(start + sign * move).requires_grad_() for sign in (1, -1)]
        # Two batches of each task: their mean is told, their sum is what is minimised.
        difference = 2 * (value(leaf[0]) - value(leaf[1])).double() / (2 * step)
        assert float(gradient[t, k]) == pytest.approx(float(difference), rel=2e-2, abs=2e-4)
    unused = vectors.names.index("unused.weight")
    assert gradient[:, unused].abs().max() == 0


def test_entropy_falls_and_what_is_predicted_is_told() -> None:
    lines: list[str] = []
    shop = workshop(tell=lines.append)
    method = AdaMerging(lr=0.02, steps=30)
    method.learn(shop)
    predictions = method.learned()["predictions"]
    before, after = (sum(p[f"entropy_{when}"] for p in predictions.values()) for when in ("before", "after"))
    assert after < before - 0.02
    assert predictions.keys() == {"task0", "task1", "task2"}
    for p in predictions.values():
        assert sum(p["marginals_after"]) == pytest.approx(1, abs=1e-3)
        assert len(p["marginals_after"]) == 4
    assert any("step 30 of 30" in line for line in lines)
    assert sum("coefficients: step" in line for line in lines) == 10
    assert any(line.startswith("task2: entropy") for line in lines)
    assert [len(method.learned()["coefficients"][key]) for key in ("mean", "least", "greatest")] == [3, 3, 3]


def test_a_collapse_shows_in_the_marginals() -> None:
    shop = workshop(tasks=1)
    constant = dict(shop.models[0])
    constant["norm.weight"] = torch.zeros(8)
    constant["norm.bias"] = torch.ones(8)
    found = TestEntropy(shop, 8, "x").predictions({n: W for n, W in constant.items() if W.is_floating_point()})
    assert max(found[0].marginals) == 1.0


def test_no_steps_is_task_arithmetic_and_nothing_of_the_workshop_changes() -> None:
    shop = workshop()
    found = [shop.base, *shop.models, shop.model.state_dict()]
    before = [{name: W.clone() for name, W in state.items()} for state in found]
    method = AdaMerging(steps=0)
    for _ in range(20):
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)
    AdaMerging(steps=3).learn(shop)
    base, deltas = parts(shop)
    for name, W in base.items():
        torch.testing.assert_close(merged[name], W + 0.3 * sum(D[name] for D in deltas), rtol=0, atol=1e-6)
    for state, old in zip([shop.base, *shop.models, shop.model.state_dict()], before, strict=True):
        assert all(torch.equal(W, old[name]) for name, W in state.items())
    assert not any(p.grad is not None for p in shop.model.parameters())


def test_the_seed_decides_and_state_survives() -> None:
    results = []
    for seed in (0, 0, 1):
        shop = workshop(seed=seed)
        method = AdaMerging(lr=0.01, steps=5, batch_size=4)
        method.learn(shop)
        other = AdaMerging()
        other.load_state_dict(method.state_dict())
        results.append(merge_state_dicts(method, shop.base, shop.models))
        again = merge_state_dicts(other, shop.base, shop.models)
        assert all(torch.equal(again[name], W) for name, W in results[-1].items())
    assert all(torch.equal(results[0][name], W) for name, W in results[1].items())
    assert not all(torch.equal(results[0][name], W) for name, W in results[2].items())


@pytest.mark.parametrize("build", [AdaMerging, Concrete, Fisher, RegMean])
def test_a_signal_stops_between_steps(build: Callable[[], Merge], monkeypatch: pytest.MonkeyPatch) -> None:
    shop = workshop(tasks=1, steps=1)
    monkeypatch.setattr(interrupt.request, "signal", 10)
    with pytest.raises(KeyboardInterrupt):
        build().learn(shop)
    assert not any(module._forward_pre_hooks for module in shop.model.modules())


def test_half_precision_models_are_run_in_their_own_dtype() -> None:
    shop = workshop(dtype=torch.bfloat16)
    method = AdaMerging(lr=0.02, steps=5)
    method.learn(shop)
    merged = merge_state_dicts(method, shop.base, shop.models)
    assert all(W.dtype == shop.base[name].dtype for name, W in merged.items())
    table = torch.stack(list(method.state_dict().values()))
    assert table.dtype == torch.float32
    assert (table - 0.3).abs().max() > 0.02


def test_tasks_of_different_image_sizes() -> None:
    shop = workshop(tasks=2)
    first, second = shop.tasks

    def larger(part: Part, size: int, seed: int) -> Iterator[Batch]:
        for batch in second.draw(part, size, seed):
            yield {**batch, "inputs": torch.nn.functional.pad(batch["inputs"], (0, 1, 0, 1))}

    mixed = dataclasses.replace(shop, tasks=[first, dataclasses.replace(second, draw=larger)])
    method = AdaMerging(steps=2)
    method.learn(mixed)
    assert method.learned()["predictions"].keys() == {"task0", "task1"}


@pytest.mark.parametrize("options", [{"lr": 0}, {"steps": -1}, {"batch_size": 0}, {"batches": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        AdaMerging(**options)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_on_cuda_it_is_the_same() -> None:
    found = []
    for device in ("cpu", "cuda"):
        shop = workshop(dtype=torch.float64, device=device)
        method = AdaMerging(lr=0.01, steps=3, batch_size=8)
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)
        found.append({name: W.cpu() for name, W in merged.items()})
    for name, W in found[0].items():
        torch.testing.assert_close(found[1][name], W, rtol=1e-4, atol=1e-4)
