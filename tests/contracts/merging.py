"""What every way of merging must do.  A new one inherits these tests by supplying `build`.

A method that looks at data also overrides `prepare`, which gives it what `learn` would have found for these tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.merging import Merge, Stack, merge_state_dicts
from subspace_lab.merging.base import Kind
from subspace_lab.merging.sources import StateDicts

State = dict[str, Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.weight": (12, 8),
    "blocks.1.weight": (12, 8),
    "blocks.2.weight": (12, 8),
    "blocks.0.bias": (12,),
    "blocks.1.bias": (12,),
    "down.weight": (6, 12),
    "down.bias": (6,),
    "token": (1, 2, 8),
    "conv.weight": (4, 3, 3, 3),
}
ODD: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "one_by_one": (1, 1),
    "row": (1, 5),
    "column": (5, 1),
    "nothing": (0,),
    "no_rows": (0, 4),
    "no_columns": (4, 0),
    "blocks.0.weight": (12, 8),
}


def state(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype, size: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def experts(
    shapes: Mapping[str, tuple[int, ...]], count: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[State, list[State]]:
    """A base of entries about 0.3 and models about 0.05 from it."""
    base = state(shapes, 100 * seed, torch.float64, 0.3)
    deltas = [state(shapes, 100 * seed + t + 1, torch.float64, 0.05) for t in range(count)]
    tuned = [{name: (base[name] + D[name]).to(dtype) for name in base} for D in deltas]
    return {name: W.to(dtype) for name, W in base.items()}, tuned


class Held(Stack):
    """Some tensors of one shape, or a flat piece of one tensor."""

    def __init__(
        self, names: Sequence[str], base: State, models: Sequence[State], piece: tuple[int, int] | None = None
    ) -> None:
        self._base, self._models, self._piece = base, models, piece
        self.names, self.models = names, len(models)
        shape = tuple(base[names[0]].shape)
        self.kind: Kind = "matrix" if len(shape) == 2 else "other"
        self.shape = shape if piece is None else (piece[1] - piece[0],)
        self.start = 0 if piece is None else piece[0]

    def _read(self, found: State) -> Tensor:
        if self._piece is None:
            return torch.stack([found[name] for name in self.names])
        return found[self.names[0]].reshape(-1)[slice(*self._piece)].clone()[None]

    @override
    def base(self) -> Tensor:
        return self._read(self._base)

    @override
    def tuned(self, t: int) -> Tensor:
        return self._read(self._models[t])


def gap(a: Tensor, b: Tensor, unit: Tensor) -> float:
    """‖a − b‖ in units of ‖unit‖."""
    return float((a.double() - b.double()).norm() / unit.double().norm().clamp_min(1e-12))


class MergeContract:
    """Subclass and implement `build`.

    Attributes:
        count: how many models are merged; fewer if the method takes fewer.
        ordered: the result depends on the order of the models, and must.
        collinear: T copies of one model give, tensor by tensor, a multiple of the update that one copy gives
            (sums and means do; random masks, truncation to r/T directions do not).
        discontinuous: share of entries that rounding may put on the other side of a threshold.
        batch_tolerance: relative difference between a stack and its tensors one at a time.
        order_tolerance: relative difference between orders of the models.
        double_tolerance: relative difference between float32 and float64.
    """

    count: int = 3
    ordered: bool = False
    collinear: bool = True
    discontinuous: float = 0.0
    batch_tolerance: float = 1e-6
    order_tolerance: float = 1e-6
    double_tolerance: float = 2e-5

    def build(self) -> Merge:
        """The method with the options to be tested; a new object each time."""
        raise NotImplementedError

    def prepare(self, method: Merge, base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> None:
        """Stand in for `learn` where `needs_data`: Fisher information, Gram matrices, coefficients of these tensors."""
        assert not method.needs_data, "override prepare"

    def experts(
        self, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[State, list[State]]:
        method = self.build()
        return experts(shapes, min(max(self.count, method.least), method.most or self.count), dtype, seed)

    def merge(
        self, base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], method: Merge | None = None
    ) -> State:
        method = self.build() if method is None else method
        self.prepare(method, base, models)
        return merge_state_dicts(method, base, models)

    def assert_close(self, a: State, b: State, base: State, models: Sequence[State], tolerance: float) -> None:
        """Differences in units of the task vectors, which are what is merged."""
        assert list(a) == list(b)
        for name, value in a.items():
            D = torch.stack([W[name].double() - base[name].double() for W in models])
            if self.discontinuous:
                unit = D.abs().amax() if D.numel() else D.sum()
                far = (value.double() - b[name].double()).abs() > 10 * tolerance * unit
                assert far.sum() <= math.ceil(self.discontinuous * far.numel()), name
            else:
                assert gap(value, b[name], D) <= tolerance, name

    def test_a_stack_equals_its_tensors_one_at_a_time(self) -> None:
        base, models = self.experts()
        for shape in sorted(set(SHAPES.values()), key=str):
            names = [name for name, s in SHAPES.items() if s == shape]
            together, alone = self.build(), self.build()
            for method in (together, alone):
                self.prepare(method, base, models)
                method.survey(StateDicts(base, models))
            U = together.update(Held(names, base, models))
            assert U.shape == (len(names), *shape)
            assert U.dtype == torch.float32
            each = torch.cat([alone.update(Held([name], base, models)) for name in names])
            if self.discontinuous:
                assert (each != U).float().mean() <= self.discontinuous
            else:
                assert gap(U, each, each) <= self.batch_tolerance, names

    def test_pieces_equal_the_whole_if_the_rule_calls_itself_elementwise(self) -> None:
        base, models = self.experts()
        method = self.build()
        if not method.elementwise:
            return
        self.prepare(method, base, models)
        method.survey(StateDicts(base, models))
        for name in SHAPES:
            whole, n = method.update(Held([name], base, models)), base[name].numel()
            cuts = sorted({0, n // 3, n // 3 + 1, n})
            pieces = [method.update(Held([name], base, models, (a, b))) for a, b in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(pieces, dim=1), whole.reshape(1, -1)), name

    def test_nothing_given_is_changed(self) -> None:
        base, models = self.experts()
        before = [{name: W.clone() for name, W in found.items()} for found in (base, *models)]
        merged = self.merge(base, models)
        for found, old in zip((base, *models), before, strict=True):
            assert list(found) == list(old)
            assert all(torch.equal(found[name], old[name]) for name in old)
        for W in merged.values():
            W.add_(1)
        assert all(torch.equal(base[name], before[0][name]) for name in base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_halves_are_summed_in_float32_and_rounded_once(self, dtype: torch.dtype) -> None:
        base, models = self.experts(dtype=dtype)
        merged = self.merge(base, models)
        wide = self.merge(
            {n: W.float() for n, W in base.items()}, [{n: W.float() for n, W in m.items()} for m in models]
        )
        for name, W in merged.items():
            assert W.dtype == dtype, name
            assert torch.equal(W, wide[name].to(dtype)), name

    def test_float64_agrees_with_float32(self) -> None:
        base, models = self.experts(dtype=torch.float64)
        # The same numbers in both: what float32 cannot hold is cut off first.
        base = {name: W.float().double() for name, W in base.items()}
        models = [{name: W.float().double() for name, W in found.items()} for found in models]
        merged = self.merge(base, models)
        assert all(W.dtype == torch.float64 for W in merged.values())
        single = self.merge(
            {n: W.float() for n, W in base.items()}, [{n: W.float() for n, W in m.items()} for m in models]
        )
        assert all(W.dtype == torch.float32 for W in single.values())
        self.assert_close(single, merged, base, models, self.double_tolerance)

    def test_order_of_the_models(self) -> None:
        base, models = self.experts()
        merged, turned = self.merge(base, models), self.merge(base, models[::-1])
        if self.ordered:
            assert max(gap(merged[n], turned[n], merged[n] - base[n]) for n in base) > 1e-3
        else:
            self.assert_close(turned, merged, base, models, self.order_tolerance)

    def test_order_of_the_tensors_does_not_matter(self) -> None:
        base, models = self.experts()
        merged = self.merge(base, models)
        turned = self.merge(dict(reversed(base.items())), [dict(reversed(found.items())) for found in models])
        self.assert_close({name: turned[name] for name in merged}, merged, base, models, self.order_tolerance)

    def test_copies_of_one_model(self) -> None:
        method = self.build()
        if not (method.scalable and self.collinear):
            return
        base, models = self.experts()
        once = models[:1] * method.least
        one, many = self.merge(base, once), self.merge(base, models[:1] * max(3, method.least))
        for name, W in one.items():
            D, E = (found.double() - base[name].double() for found in (W, many[name]))
            assert E.norm() > 0, name
            cosine = (D * E).sum() / (D.norm() * E.norm())
            assert cosine >= 1 - 1e-5, name

    def test_scale_0_is_the_base_bit_for_bit(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            method = self.build()
            if not method.scalable:
                return
            method.scale = 0.0
            base, models = self.experts(dtype=dtype)
            merged = self.merge(base, models, method)
            assert all(torch.equal(merged[name], W) for name, W in base.items())

    def test_scale_multiplies_the_update(self) -> None:
        method, double = self.build(), self.build()
        if not method.scalable:
            return
        double.scale = 2 * method.scale
        base, models = self.experts()
        one, two = self.merge(base, models, method), self.merge(base, models, double)
        for name, W in base.items():
            assert gap(two[name] - W, 2 * (one[name] - W), one[name] - W) <= 1e-5, name

    def test_tensors_that_are_not_floating_point_are_the_bases(self) -> None:
        base, models = self.experts()
        for k, found in enumerate((base, *models)):
            found |= {"steps": torch.tensor(3 + k), "index": torch.arange(4) + k, "mask": torch.tensor([k % 2 == 0])}
        merged = self.merge(base, models)
        for name in ("steps", "index", "mask"):
            assert torch.equal(merged[name], base[name])
            assert merged[name].dtype == base[name].dtype
        assert list(merged) == list(base)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_models_equal_to_the_base_give_the_base(self, dtype: torch.dtype) -> None:
        base, models = self.experts(dtype=dtype)
        merged = self.merge(base, [dict(base) for _ in models])
        for name, W in merged.items():
            assert torch.isfinite(W).all(), name
            torch.testing.assert_close(W, base[name], rtol=1e-6 if dtype == torch.float32 else 0.0, atol=1e-7)

    def test_one_tensor_of_one_model_unchanged(self) -> None:
        """A layer that was frozen in one, or in all, of the fine-tunings."""
        base, models = self.experts()
        models[0]["blocks.1.weight"] = base["blocks.1.weight"].clone()
        for found in models:
            found["down.weight"], found["down.bias"] = base["down.weight"].clone(), base["down.bias"].clone()
        merged = self.merge(base, models)
        assert all(torch.isfinite(W).all() for W in merged.values())
        for name in ("down.weight", "down.bias"):
            torch.testing.assert_close(merged[name], base[name], rtol=1e-6, atol=1e-7)

    def test_odd_shapes(self) -> None:
        base, models = self.experts(ODD)
        merged = self.merge(base, models)
        for name, W in merged.items():
            assert W.shape == base[name].shape, name
            assert torch.isfinite(W).all(), name

    def test_the_same_bits_twice(self) -> None:
        base, models = self.experts()
        method = self.build()
        found = [self.merge(base, models, method), self.merge(base, models, method), self.merge(base, models)]
        for other in found[1:]:
            assert all(torch.equal(other[name], W) for name, W in found[0].items())

    def test_an_earlier_merge_is_forgotten(self) -> None:
        method = self.build()
        self.merge(*self.experts(seed=1), method)
        self.merge(*self.experts(ODD, seed=2), method)
        base, models = self.experts()
        merged, fresh = self.merge(base, models, method), self.merge(base, models)
        assert all(torch.equal(merged[name], W) for name, W in fresh.items())

    def test_figures_are_finite(self) -> None:
        method = self.build()
        self.merge(*self.experts(), method)
        assert all(math.isfinite(value) for value in method.metrics().values())
        assert method.has_factor or method.factor() == 1.0

    def test_parameters_with_gradients_and_views_are_read_as_they_are(self) -> None:
        base, models = self.experts()
        merged = self.merge(base, models)
        views = [
            {n: torch.nn.Parameter(W.mT.contiguous().mT if W.ndim > 1 else W.clone()) for n, W in found.items()}
            for found in (base, *models)
        ]
        other = self.merge(views[0], views[1:])
        for name, W in merged.items():
            assert torch.equal(other[name], W), name
            assert not other[name].requires_grad

    @pytest.mark.cuda
    def test_on_cuda_it_is_the_same(self) -> None:
        base, models = self.experts()
        merged = self.merge(base, models)
        method = self.build()
        there = [{name: W.cuda() for name, W in found.items()} for found in (base, *models)]
        self.prepare(method, there[0], there[1:])
        other = merge_state_dicts(method, there[0], there[1:])
        assert all(W.is_cuda for W in other.values())
        self.assert_close({n: W.cpu() for n, W in other.items()}, merged, base, models, 1e-4)
