"""Fisher averaging and RegMean: the contract, equality with loops, analytic cases, normal equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from contracts.merging import Held, MergeContract
from contracts.merging_workshop import Encoder, workshop
from reference.merging_adaptive_literal import literal_fisher, literal_regmean, loaded
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging import Merge, merge_state_dicts
from subspace_lab.merging import fisher as fisher_module
from subspace_lab.merging.fisher import Fisher, diagonal_fisher
from subspace_lab.merging.regmean import RegMean, input_second_moments
from subspace_lab.merging.workshop import TaskBench, Workshop

State = Mapping[str, Tensor]


class TestFisherContract(MergeContract):
    @override
    def build(self) -> Fisher:
        return Fisher()

    @override
    def prepare(self, method: Merge, base: State, models: Sequence[State]) -> None:
        assert isinstance(method, Fisher)
        state = {
            f"{t}/{name}": (W.float() - base[name].float()).square() + 1e-3
            for t, found in enumerate(models)
            for name, W in found.items()
            if W.is_floating_point()
        }
        method.load_state_dict(state)


class TestRegMeanContract(MergeContract):
    @override
    def build(self) -> RegMean:
        return RegMean()

    @override
    def prepare(self, method: Merge, base: State, models: Sequence[State]) -> None:
        assert isinstance(method, RegMean)
        state: dict[str, Tensor] = {}
        for found in models:
            for name, W in found.items():
                if W.ndim < 2 or name == "token" or W.numel() == 0 or not W.is_floating_point():
                    continue
                X = W.detach().double().flatten(1)
                G = X.mT @ X + 0.1 * torch.eye(X.shape[1], dtype=torch.float64, device=X.device)
                for key, value in (("grams", G), ("weighted", (X - base[name].double().flatten(1)) @ G)):
                    state[f"{key}/{name}"] = state.get(f"{key}/{name}", 0) + value
        method.load_state_dict(state)


def deltas(shop: Workshop, t: int) -> dict[str, Tensor]:
    return {name: W - shop.base[name] for name, W in shop.models[t].items() if W.is_floating_point()}


class TestFisher:
    def test_every_example_and_class_by_itself(self) -> None:
        shop = workshop(tasks=1, dtype=torch.float64)
        batch = next(shop.tasks[0].draw("train", 20, 0))
        expected = literal_fisher(shop.model, dict(shop.models[0]), shop.tasks[0].head, batch["inputs"])
        found = diagonal_fisher(shop, 0, 256)
        assert found.keys() == expected.keys()
        for name, F in found.items():
            torch.testing.assert_close(F, expected[name], rtol=1e-8, atol=1e-14)
        assert all(found[name].count_nonzero() == 0 for name in ("unused.weight", "unused.bias"))
        assert found["down.weight"].count_nonzero() > 0  # frozen, and it matters all the same

    def test_chunks_of_classes_and_examples_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shop = workshop(tasks=1, dtype=torch.float64)
        expected = diagonal_fisher(shop, 0, 7)
        size = sum(F.numel() for F in expected.values())
        for entries in (1, 3 * size, 9 * size):
            monkeypatch.setattr(fisher_module, "_ENTRIES", entries)
            for name, F in diagonal_fisher(shop, 0, 7).items():
                torch.testing.assert_close(F, expected[name], rtol=1e-10, atol=1e-16)

    def test_two_classes_by_hand(self) -> None:
        # Logits (w·x, 0): ∂ log p_1 = (1−p) x and ∂ log p_0 = −p x, so F = p (1−p) x².
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.5]])
        w = torch.tensor([[0.7, -0.2, 0.4]])

        def head(features: Tensor) -> Tensor:
            return torch.cat([features, torch.zeros_like(features)], dim=1)

        task = TaskBench("two", head, lambda *_: iter([{"inputs": x}]), {"train": 2, "validation": 0, "test": 0})
        model = nn.Linear(3, 1, bias=False).eval()
        shop = Workshop(model, {"weight": w}, [{"weight": w}], [task], 0, torch.device("cpu"), lambda _: None)
        p = torch.sigmoid(x @ w.mT)
        torch.testing.assert_close(diagonal_fisher(shop, 0, 2)["weight"][0], (p * (1 - p) * x**2).mean(0))

    def test_merged_by_the_formula_of_the_release(self) -> None:
        shop = workshop(dtype=torch.float64)
        method = Fisher(floor=1e-3)
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)
        found = [diagonal_fisher(shop, t, 256) for t in range(3)]
        norms = [torch.cat([F.flatten() for F in each.values()]).norm() for each in found]
        assert max(norms) > 1.1 * min(norms)
        for name in found[0]:
            weights = [F[name].clamp_min(1e-3) / norm for F, norm in zip(found, norms, strict=True)]
            top = sum(w * shop.models[t][name] for t, w in enumerate(weights))
            torch.testing.assert_close(merged[name], top / sum(weights), rtol=1e-9, atol=1e-12)
        mean = torch.stack([W["norm.running_mean"] for W in shop.models]).mean(0)
        torch.testing.assert_close(merged["norm.running_mean"], mean)
        assert merged["norm.num_batches_tracked"] == shop.base["norm.num_batches_tracked"]

    @pytest.mark.parametrize("normalize", [True, False])
    def test_equal_fishers_give_the_average(self, normalize: bool) -> None:
        shop = workshop()
        method = Fisher(normalize=normalize, floor=1e9)
        method.learn(dataclasses.replace(shop, models=[shop.models[0]] * 3, tasks=[shop.tasks[0]] * 3))
        merged = merge_state_dicts(method, shop.base, shop.models)
        for name, W in merged.items():
            if W.is_floating_point():
                torch.testing.assert_close(W, torch.stack([m[name] for m in shop.models]).mean(0), rtol=0, atol=2e-7)

    def test_state_survives_and_learning_is_repeatable(self) -> None:
        shop = workshop()
        first, second, third = Fisher(), Fisher(), Fisher()
        first.learn(shop)
        second.learn(shop)
        third.load_state_dict(first.state_dict())
        results = [merge_state_dicts(m, shop.base, shop.models) for m in (first, second, third)]
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)

    def test_other_models_are_refused(self) -> None:
        shop = workshop(tasks=1)
        method = Fisher()
        method.learn(shop)
        with pytest.raises(UserError, match="nothing was learnt for tensor else"):
            method.update(Held(["else"], {"else": torch.ones(3)}, [{"else": torch.ones(3)}]))


class TestRegMean:
    def test_equals_the_transcription(self) -> None:
        shop = workshop(dtype=torch.float64)
        method = RegMean(reduction=0.7)
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)
        for path in ("patch", "qkv", "up", "down"):
            grams, weights = [], []
            for t, task in enumerate(shop.tasks):
                network = loaded(shop.model, dict(shop.models[t]))
                seen: list[Tensor] = []
                network.get_submodule(path).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
                network(next(task.draw("train", 20, 0))["inputs"])
                X = functional.unfold(seen[0], 2, stride=2).mT if path == "patch" else seen[0]
                X = X.reshape(-1, X.shape[-1]).detach().numpy()
                grams.append(X.T @ X / len(X))
                weights.append(shop.models[t][f"{path}.weight"].flatten(1).numpy())
            expected = literal_regmean(grams, weights, 0.7).view_as(merged[f"{path}.weight"])
            # The ridge, 1e-6 of the mean diagonal, is all that differs.
            torch.testing.assert_close(merged[f"{path}.weight"], expected, rtol=0, atol=2e-6)
        for name in ("up.bias", "position", "unused.weight", "norm.running_var"):
            torch.testing.assert_close(merged[name], torch.stack([m[name] for m in shop.models]).mean(0))

    def test_normal_equations_hold(self) -> None:
        shop = workshop(dtype=torch.float64)
        method = RegMean(reduction=1.0)
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)
        W = merged["up.weight"]
        moments = [input_second_moments(shop, t, 256)["up"] for t in range(3)]
        residual = sum((W - shop.models[t]["up.weight"]) @ G for t, G in enumerate(moments))
        size = sum(shop.models[t]["up.weight"].norm() * G.norm() for t, G in enumerate(moments))
        assert isinstance(residual, Tensor)
        assert residual.norm() <= 1e-6 * size
        mean = torch.stack([m["up.weight"] for m in shop.models]).mean(0)
        away = sum((mean - shop.models[t]["up.weight"]) @ G for t, G in enumerate(moments))
        assert isinstance(away, Tensor)
        assert away.norm() > 100 * residual.norm()

    def test_equal_inputs_give_the_average(self) -> None:
        shop = workshop()
        same = dataclasses.replace(shop, tasks=[shop.tasks[0]] * 3)
        method = RegMean(reduction=1.0)
        method.learn(dataclasses.replace(same, models=[shop.models[0]] * 3))
        grams = {name: value for name, value in method.state_dict().items() if name.startswith("grams/")}
        weighted = {
            f"weighted/{name.removeprefix('grams/')}": sum(
                deltas(shop, t)[name.removeprefix("grams/")].double().flatten(1) @ (G / 3) for t in range(3)
            )
            for name, G in grams.items()
        }
        method.load_state_dict({**grams, **weighted})
        merged = merge_state_dicts(method, shop.base, shop.models)
        for name, W in merged.items():
            if W.is_floating_point():
                torch.testing.assert_close(W, torch.stack([m[name] for m in shop.models]).mean(0), rtol=0, atol=3e-7)

    def test_inputs_that_no_task_uses_are_averaged(self) -> None:
        x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
        x[:, 2] = 0.0
        model = nn.Linear(5, 4, bias=False).eval()
        W = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
        task = TaskBench("t", lambda z: z, lambda *_: iter([{"inputs": x}]), {"train": 30, "validation": 0, "test": 0})
        shop = Workshop(
            model, {"weight": W[2]}, [{"weight": W[0]}, {"weight": W[1]}], [task] * 2, 0, torch.device("cpu"), print
        )
        method = RegMean()
        method.learn(shop)
        merged = merge_state_dicts(method, shop.base, shop.models)["weight"]
        torch.testing.assert_close(merged[:, 2], W[:2, :, 2].mean(0))
        assert torch.isfinite(merged).all()

    def test_parts_of_a_fused_projection_share_its_inputs(self) -> None:
        shop = workshop(dtype=torch.float64)
        method = RegMean()
        method.learn(shop)
        whole = method.update(Held(["qkv.weight"], dict(shop.base), [dict(m) for m in shop.models]))[0]
        names = [f"qkv.weight#{k}" for k in range(3)]
        cut = [
            {name: W["qkv.weight"][8 * k : 8 * k + 8] for k, name in enumerate(names)}
            for W in (shop.base, *shop.models)
        ]
        parts = method.update(Held(names, cut[0], cut[1:]))
        torch.testing.assert_close(parts.reshape(24, 8), whole, rtol=1e-10, atol=1e-14)

    def test_networks_are_as_they_were_and_learning_is_repeatable(self) -> None:
        shop = workshop()
        before = {name: value.clone() for name, value in shop.model.state_dict().items()}
        first, second, third = RegMean(), RegMean(), RegMean()
        first.learn(shop)
        second.learn(shop)
        third.load_state_dict(first.state_dict())
        assert all(torch.equal(before[name], value) for name, value in shop.model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in shop.model.modules())
        results = [merge_state_dicts(m, shop.base, shop.models) for m in (first, second, third)]
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
        assert first.learned()["layers"] == 4

    @pytest.mark.parametrize("options", [{"reduction": 1.1}, {"reduction": -0.1}, {"examples": 0}])
    def test_options_out_of_range(self, options: dict[str, float]) -> None:
        with pytest.raises(UserError, match=next(iter(options))):
            RegMean(**options)  # type: ignore[arg-type]


def test_the_encoder_has_what_it_takes() -> None:
    names = [name for name, p in Encoder().named_parameters() if not p.requires_grad]
    assert names == ["down.weight", "down.bias"]
    assert np.isclose(sum(p.numel() for p in Encoder().parameters()), 8 * 5 + 32 + 24 * 9 + 16 * 9 + 8 * 17 + 16 + 20)
