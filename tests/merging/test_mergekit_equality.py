"""Task arithmetic, TIES, SLERP and DARE equal mergekit on the same files.

`GOLDEN` was computed by `mergekit-pytorch` of mergekit 0.1.5 (PyPI) with torch 2.15.0 on the CPU from the files that
`write_inputs` makes.  Where mergekit is installed, it merges them again and every entry is compared.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspace_lab.linalg.random import derive_key, uniform
from subspace_lab.merging import Merge
from subspace_lab.merging.averaging import TaskArithmetic
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.files import merge_files
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES

SHAPES: dict[str, tuple[int, ...]] = {"layer.weight": (24, 16), "wide.weight": (16, 40), "layer.bias": (16,)}
SETTINGS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"merge_method": "task_arithmetic", "weight": 0.3},
    "ties": {"merge_method": "ties", "weight": 1.0, "density": 0.3, "normalize": True},
    "ties_sum": {"merge_method": "ties", "weight": 0.4, "density": 0.3, "normalize": False},
    "dare": {"merge_method": "dare_linear", "weight": 0.7, "density": 0.4},
    "slerp": {"merge_method": "slerp", "t": 0.3},
}
OURS: dict[str, Merge] = {
    "task_arithmetic": TaskArithmetic(0.3),
    "ties": TIES(1.0, density=0.3, trim="tensor"),
    "ties_sum": TIES(0.4, density=0.3, trim="tensor", combine="sum"),
    "dare": DARE(0.7, p=0.6, rescale="l1"),
    "slerp": SLERP(0.3),
}
MODELS = {"task_arithmetic": 3, "ties": 3, "ties_sum": 3, "dare": 1, "slerp": 2}


def inputs(model: int) -> dict[str, Tensor]:
    """The base (-1) or a model, from a counter: the same everywhere."""

    def draw(who: int, name: str) -> Tensor:
        return uniform(SHAPES[name], key=derive_key("mergekit", who, name)) - 0.5

    # One tensor of the models is nearly parallel: SLERP takes its other branch.
    size = {"layer.weight": 0.8, "wide.weight": 0.4, "layer.bias": 0.002}
    return {
        name: draw(-1, name) + (0 if model < 0 else size[name]) * (draw(model, name) if model >= 0 else 0)
        for name in SHAPES
    }


def write_inputs(folder: Path) -> None:
    for model in (-1, 0, 1, 2):
        save_file(inputs(model), folder / f"{'base' if model < 0 else model}.safetensors")


def figures(merged: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each tensor: entries 0, 5 and 11, sum of the entries and of their squares."""
    return {
        name: [*W.flatten()[[0, 5, 11]].double().tolist(), float(W.double().sum()), float(W.double().square().sum())]
        for name, W in merged.items()
    } | {f"|{name}|": [float((W.double() - base[name].double()).abs().sum())] for name, W in merged.items()}


def ours(name: str, folder: Path) -> dict[str, Tensor]:
    models = [str(folder / f"{t}.safetensors") for t in range(MODELS[name])]
    base = str(folder / "base.safetensors")
    merge_files(OURS[name], MergeSettings(models, base, device="cpu"), folder / name, lambda _: None)
    return load_file(folder / name / "model.safetensors")


def mergekit(name: str, folder: Path, python: str) -> dict[str, Tensor]:
    """The same merge by `mergekit-pytorch`."""
    options = dict(SETTINGS[name])
    config: dict[str, Any] = {"merge_method": options.pop("merge_method"), "dtype": "float32"}
    paths = [str(folder / f"{t}.safetensors") for t in range(MODELS[name])]
    if name == "slerp":
        config |= {"base_model": paths[0], "models": [{"model": path} for path in paths], "parameters": options}
    else:
        each = {key: options.pop(key) for key in ("weight", "density") if key in options}
        config |= {
            "base_model": str(folder / "base.safetensors"),
            "models": [{"model": path, "parameters": each} for path in paths],
            "parameters": options,
        }
    file, output = folder / f"{name}.yaml", folder / f"{name}-mergekit"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [python, "-c", "from mergekit.scripts.merge_raw_pytorch import main; main()", str(file), str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mergekit")
    write_inputs(made)
    return made


@pytest.mark.parametrize("name", sorted(OURS))
def test_equals_the_golden_numbers(name: str, folder: Path) -> None:
    found = figures(ours(name, folder), inputs(-1))
    for key, expected in GOLDEN[name].items():
        if name == "dare" and not key.startswith("|"):
            continue  # which entries are dropped is each program's own; the L1 norm of what is left is not
        assert found[key] == pytest.approx(expected, rel=2e-6, abs=2e-7), key


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed")
@pytest.mark.parametrize("name", sorted(OURS))
def test_equals_mergekit_entry_by_entry(name: str, folder: Path) -> None:
    merged, theirs, base = ours(name, folder), mergekit(name, folder, sys.executable), inputs(-1)
    for tensor, W in theirs.items():
        if name == "dare":
            ours_kept, theirs_kept = (float((x[tensor] != base[tensor]).float().mean()) for x in (merged, theirs))
            slack = 4 * (0.4 * 0.6 * 2 / W.numel()) ** 0.5
            assert abs(ours_kept - theirs_kept) <= slack
            continue
        assert torch.allclose(merged[tensor], W, rtol=0, atol=5e-7), tensor


GOLDEN: dict[str, dict[str, list[float]]] = {
    "task_arithmetic": {
        "layer.bias": [
            0.3064730167388916,
            -0.44868791103363037,
            0.1748851090669632,
            0.8257866185158491,
            1.2679426127665938,
        ],
        "layer.weight": [
            0.2740074396133423,
            0.2030898630619049,
            -0.16284532845020294,
            0.09315036609768867,
            40.359552000288375,
        ],
        "wide.weight": [
            -0.35469475388526917,
            -0.2881571054458618,
            0.029596291482448578,
            -2.2915545906871557,
            58.36322089657489,
        ],
        "|layer.bias|": [0.004938630387187004],
        "|layer.weight|": [39.81639635190368],
        "|wide.weight|": [31.84496513567865],
    },
    "ties": {
        "layer.bias": [
            0.3071061372756958,
            -0.4480649530887604,
            0.17435204982757568,
            0.824602983891964,
            1.2681937646186279,
        ],
        "layer.weight": [
            0.2841677665710449,
            0.438989520072937,
            0.017345666885375977,
            -1.59555584192276,
            64.02486431902481,
        ],
        "wide.weight": [
            -0.41521739959716797,
            -0.266032338142395,
            0.14726126194000244,
            -2.366749346256256,
            66.6444101563828,
        ],
        "|layer.bias|": [0.0075163766741752625],
        "|layer.weight|": [84.56227415800095],
        "|wide.weight|": [70.29143762588501],
    },
    "ties_sum": {
        "layer.bias": [
            0.30663853883743286,
            -0.448505699634552,
            0.17482565343379974,
            0.8254464268684387,
            1.2680795262984312,
        ],
        "layer.weight": [
            0.2841677665710449,
            0.37136310338974,
            0.017345666885375977,
            0.7415278404951096,
            42.67620792647898,
        ],
        "wide.weight": [
            -0.31322938203811646,
            -0.266032338142395,
            0.10935018956661224,
            -3.2618363983929157,
            58.40645877262154,
        ],
        "|layer.bias|": [0.003395378589630127],
        "|layer.weight|": [41.60260419547558],
        "|wide.weight|": [34.13630634173751],
    },
    "dare": {
        "layer.bias": [
            0.30632680654525757,
            -0.4487995505332947,
            0.17514139413833618,
            0.8246986493468285,
            1.270171722778223,
        ],
        "layer.weight": [
            0.2841677665710449,
            0.6004431247711182,
            -0.25752514600753784,
            -1.2319245710968971,
            53.93218155188528,
        ],
        "wide.weight": [
            -0.2452373504638672,
            -0.20123594999313354,
            -0.04229414463043213,
            -5.994724046438932,
            67.15355712601315,
        ],
        "|layer.bias|": [0.006624244153499603],
        "|layer.weight|": [54.277809113264084],
        "|wide.weight|": [44.383548606187105],
    },
    "slerp": {
        "layer.bias": [
            0.3061298429965973,
            -0.44909149408340454,
            0.17458219826221466,
            0.8252886952832341,
            1.2685331792874297,
        ],
        "layer.weight": [
            0.4359090328216553,
            0.46234220266342163,
            -0.16880172491073608,
            -3.335349315777421,
            52.881084423042736,
        ],
        "wide.weight": [
            -0.35321903228759766,
            -0.2542057931423187,
            0.0494048148393631,
            -1.4636855153366923,
            65.33125355911756,
        ],
        "|layer.bias|": [0.0068092672154307365],
        "|layer.weight|": [63.20574767328799],
        "|wide.weight|": [47.14755391422659],
    },
}
