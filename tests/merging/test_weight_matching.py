"""Weight matching: the literal algorithm, its optima, files, several models, the contract."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts.merging import MergeContract, State
from contracts.permuted_networks import GREY, NETWORKS, alive
from reference import merging_alignment_literal as literal
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging import merge_state_dicts
from subspace_lab.merging.architectures import find_spec
from subspace_lab.merging.connectivity import interpolate
from subspace_lab.merging.files import merge_files
from subspace_lab.merging.permutations import Axis, Heads, PermutationSpec, one
from subspace_lab.merging.settings import MergeSettings, TensorRules
from subspace_lab.merging.sources import StateDicts
from subspace_lab.merging.weight_matching import WeightMatching, match
from subspace_lab.models.mlp import build_mlp


@pytest.mark.parametrize("network", ["mlp", "small_cnn", "gpm_resnet18", "vit_digits"])
def test_the_objective_never_falls(network: str) -> None:
    build, _, heads = NETWORKS[network]
    a, b = (alive(build, seed).state_dict() for seed in (0, 1))
    spec = find_spec(StateDicts(a, []).infos(), "auto", heads)
    found = match(spec, a.__getitem__, b.__getitem__)
    assert found.sweeps >= 2
    assert found.objective[-1] > found.objective[0]
    for earlier, later in itertools.pairwise(found.objective):
        assert later >= earlier - 1e-6 * abs(earlier)


def shuffled_orders(count: int, seed: int) -> Iterator[Sequence[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator).tolist()


def test_equals_the_literal_algorithm() -> None:
    builds = {
        "mlp": lambda: build_mlp(hidden=[24, 16, 20], data_shape=GREY, data_classes=5),
        "small_cnn": NETWORKS["small_cnn"][0],
    }
    for build in builds.values():
        a, b = ({n: W.double() for n, W in alive(build, seed).state_dict().items()} for seed in (0, 1))
        spec = find_spec(StateDicts(a, []).infos())
        plain = {
            name: [None if axis is None else axis.parts[0] for axis in axes]
            for name, axes in spec.axes.items()
            if "running" not in name and any(axes)
        }
        arrays = [{name: found[name].numpy() for name in plain} for found in (a, b)]
        for seed in range(3):
            found = match(spec, a.__getitem__, b.__getitem__, seed=seed)
            names = list(dict.fromkeys(p for axes in plain.values() for p in axes if p is not None))
            assert names == [unit[0] for unit in spec.units]
            expected = literal.weight_matching(plain, *arrays, shuffled_orders(len(names), seed))
            for name, order in expected.items():
                assert np.array_equal(found.permutations[name].numpy(), order), name
            assert found.objective[-1] == pytest.approx(literal.objective(plain, expected, *arrays), rel=1e-10)


def test_heads_are_assigned_as_blocks_and_exactly() -> None:
    """Two heads of three units: all 2!·(3!·3!)² arrangements tried."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (6, 4), "k": (6, 4), "v": (6, 4), "o": (4, 6)}
    a, b = ({n: torch.randn(s, generator=generator).double() for n, s in shapes.items()} for _ in range(2))
    axes: dict[str, tuple[Axis | None, ...]] = {n: (one("qk"), None) for n in "qk"}
    axes |= {"v": (one("vo"), None), "o": (None, one("vo"))}
    spec = PermutationSpec(axes, {"qk": 6, "vo": 6}, (Heads(("qk", "vo"), 2),))
    found = match(spec, a.__getitem__, b.__getitem__)

    def best(names: str, i: int, j: int) -> float:
        rows = [
            (a[n].mT if n == "o" else a[n])[3 * i : 3 * i + 3] @ (b[n].mT if n == "o" else b[n])[3 * j : 3 * j + 3].mT
            for n in names
        ]
        A = torch.stack(rows).sum(0)
        return max(float(A[range(3), list(order)].sum()) for order in itertools.permutations(range(3)))

    tried = [sum(best(names, i, order[i]) for names in ("qk", "vo") for i in (0, 1)) for order in ((0, 1), (1, 0))]
    assert found.objective[-1] == pytest.approx(max(tried), rel=1e-12)
    assert sorted(found.permutations["qk"].tolist()) == list(range(6))
    assert {int(i) // 3 for i in found.permutations["qk"][:3]} == {int(i) // 3 for i in found.permutations["vo"][:3]}


def test_fused_queries_keys_and_values_are_the_three_matrices() -> None:
    torch.manual_seed(0)
    a, b = (alive(NETWORKS["vit_digits"][0], seed).state_dict() for seed in (0, 1))

    def apart(state: State) -> State:
        found = {}
        for name, W in state.items():
            if ".qkv." in name:
                found |= {name.replace("qkv", part): w for part, w in zip("qkv", W.chunk(3), strict=True)}
            else:
                found[name] = W
        return found

    fused = merge_state_dicts(WeightMatching(heads=4), a, [a, b])
    cut = merge_state_dicts(WeightMatching(heads=4), apart(a), [apart(a), apart(b)])
    for name, W in apart(fused).items():
        torch.testing.assert_close(cut[name], W, rtol=1e-6, atol=1e-6)
    split = merge_state_dicts(WeightMatching(heads=4), a, [a, b], rules=TensorRules(split_fused_qkv=True))
    assert all(torch.equal(split[name], W) for name, W in fused.items())


def test_files_in_any_order_of_tensors_and_in_bf16(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = dict(alive(NETWORKS["mlp without biases"][0], 0).state_dict())
    spec = find_spec(StateDicts(state, []).infos())
    turned = spec.apply(state, spec.random(torch.Generator().manual_seed(1)))
    for name, found in (("a", state), ("b", turned)):
        # As text, "11.weight" comes before "3.weight".
        save_file({n: found[n].bfloat16().contiguous() for n in sorted(found)}, tmp_path / f"{name}.safetensors")
    settings = MergeSettings(models=[str(tmp_path / f"{name}.safetensors") for name in "ab"])
    told = merge_files(WeightMatching(), settings, tmp_path / "merged", lambda line: None)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(state)
    for name, W in state.items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], W.bfloat16()), name
    assert told["metrics"]["weight_matching/moved"] > 0.5
    assert told["method"]["parameters"] == {"spec": "auto", "heads": None, "t": 0.5, "seed": 0}


def test_more_than_two_are_matched_to_the_first_and_averaged() -> None:
    build = NETWORKS["mlp"][0]
    state = dict(alive(build, 0).state_dict())
    spec = find_spec(StateDicts(state, []).infos())
    turned = [spec.apply(state, spec.random(torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    merged = merge_state_dicts(WeightMatching(), state, [state, *turned])
    for name, W in merged.items():
        torch.testing.assert_close(W, state[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="second of two models: there are 3"):
        merge_state_dicts(WeightMatching(t=0.3), state, [state, *turned])


def test_t_goes_from_the_first_to_the_permuted_second() -> None:
    a, b = (dict(alive(NETWORKS["mlp"][0], seed).state_dict()) for seed in (0, 1))
    ends = [merge_state_dicts(WeightMatching(t=t), a, [a, b]) for t in (0.0, 1.0)]
    method = WeightMatching(t=0.25)
    merged = merge_state_dicts(method, a, [a, b])
    assert method.network is not None
    turned = method.network.apply(b, method.matchings[0].permutations)
    between = interpolate(a, turned, 0.25)
    for name in a:
        torch.testing.assert_close(ends[0][name], a[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ends[1][name], turned[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged[name], between[name], rtol=1e-6, atol=1e-6)
    other_base = {name: torch.randn_like(W) for name, W in a.items()}
    elsewhere = merge_state_dicts(WeightMatching(t=0.25), other_base, [a, b])
    for name in a:
        torch.testing.assert_close(elsewhere[name], merged[name], rtol=1e-5, atol=1e-6)


class TestWeightMatchingContract(MergeContract):
    count = 2

    @override
    def build(self) -> WeightMatching:
        return WeightMatching(PermutationSpec({"blocks.0.weight": (one("rows"), None)}, {"rows": 12}))
