"""Checkpoints on disk are merged like state dicts in memory, by rules, with a card."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from contracts.merging_files import Halved, merge, state, write_checkpoints
from safetensors.torch import load_file, save_file

from subspace_lab.merging import Merge, merge_state_dicts
from subspace_lab.merging.averaging import SimpleAverage, TaskArithmetic
from subspace_lab.merging.checkpoints import Checkpoint
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoints(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", [TaskArithmetic(0.3), TIES(), DARE(), Halved()], ids=lambda m: type(m).__name__)
def test_files_give_what_state_dicts_give(method: Merge, dtype: torch.dtype, tmp_path: Path) -> None:
    states = [state(t, dtype) for t in range(4)]
    for t, one in enumerate(states):
        save_file(one, tmp_path / f"{t}.safetensors")
    found = merge(tmp_path, method, base=str(tmp_path / "0.safetensors"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = merge_state_dicts(method, states[0], states[1:])
    assert merged.keys() == expected.keys()
    for name, W in expected.items():
        assert merged[name].dtype == W.dtype == states[0][name].dtype, name
        assert torch.equal(merged[name], W), name
    assert torch.equal(merged["position_ids"], states[0]["position_ids"])
    assert found["tensors"] == {"matrix": 4, "other": 2, "kept": 3}
    assert found["bytes_written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert not list(tmp_path.glob(".out*"))


def test_models_of_another_precision_are_merged_in_the_bases(folder: Path) -> None:
    save_file(state(1, torch.bfloat16), folder / "1.safetensors")
    merge(folder)
    expected = merge_state_dicts(TaskArithmetic(0.3), state(0), [state(1, torch.bfloat16), state(2), state(3)])
    merged = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], W) for name, W in expected.items())


def test_the_card_says_what_was_merged_and_how(folder: Path) -> None:
    found = merge(folder, TIES(0.7, density=0.3), models={"mnist": str(folder / "1.safetensors")}, family="mine")
    record = json.loads((folder / "out" / "merge.json").read_text())
    assert record["method"]["name"] == "ties"
    assert "2306.01708" in record["method"]["paper"]
    assert record["method"]["parameters"] == {"scale": 0.7, "density": 0.3, "trim": "global", "combine": "mean"}
    assert record["scale_chosen"] == "given"
    assert record["family"] == "mine"
    digest = hashlib.sha256((folder / "1.safetensors").read_bytes()).hexdigest()
    assert record["models"]["mnist"]["files"][0]["sha256"] == digest
    assert record["models"] == found["models"]
    assert found["metrics"]["density"] > 0.29
    card = (folder / "out" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- merge\n")
    assert digest in card
    assert "| density | 0.3 |" in card
    assert record["versions"].keys() == {"python", "subspace-lab", "torch", "safetensors"}


def test_rules_of_tensors(folder: Path) -> None:
    found = merge(folder, Halved(), exclude=["^norm$", "embed"], vectors=["layers.1"], split_fused_qkv=True)
    assert found["tensors"] == {"matrix": 2, "other": 2, "kept": 5}
    merged = load_file(folder / "out" / "model.safetensors")
    assert torch.equal(merged["norm"], state(0)["norm"])
    assert torch.equal(merged["embed.weight"], state(0)["embed.weight"])
    assert not torch.equal(merged["one"], state(0)["one"])
    # A sum is the same in three parts as in one.
    expected = merge_state_dicts(Halved(), state(0), [state(t) for t in (1, 2, 3)])
    name = "layers.0.attn.in_proj_weight"
    assert torch.equal(merged[name], expected[name])


def test_no_base_is_needed_for_the_average_and_slerp(folder: Path) -> None:
    merge(folder, SimpleAverage(), base=None)
    merged = load_file(folder / "out" / "model.safetensors")
    mean = torch.stack([state(t)["embed.weight"] for t in (1, 2, 3)]).mean(0)
    assert torch.allclose(merged["embed.weight"], mean, atol=1e-6)
    assert torch.equal(merged["position_ids"], state(1)["position_ids"])
    two = [str(folder / f"{t}.safetensors") for t in (1, 2)]
    merge(folder, SLERP(0.0), models=two, base=None)
    assert torch.equal(load_file(folder / "out" / "model.safetensors")["norm"], state(1)["norm"])


def test_what_is_not_of_floating_point_may_be_missing(folder: Path) -> None:
    less = state(1)
    del less["position_ids"], less["mask"]
    save_file(less | {"counter": torch.tensor(4)}, folder / "1.safetensors")
    merge(folder)
    merged = load_file(folder / "out" / "model.safetensors")
    assert merged.keys() == state(0).keys()


def test_the_same_model_twice_is_noted(folder: Path) -> None:
    one, base = str(folder / "1.safetensors"), str(folder / "base.safetensors")
    found = merge(folder, models=[one, one, base])
    assert found["notes"] == [f"model 2 is model 1 once more: {one}", f"model 3 is the base once more: {base}"]


def test_old_files_whose_tensors_are_not_aligned_can_be_read(folder: Path) -> None:
    value = torch.arange(6, dtype=torch.float32)
    header = b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    header += b" " * ((5 - len(header)) % 8)  # begins at an odd byte
    path = folder / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + value.numpy().tobytes())
    assert torch.equal(Checkpoint(str(path), "merge.base").read("a", 1, 5), value[1:5])
