"""Checkpoints that do not fit are refused in one line each, before any work, and nothing is left half-written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.merging_files import Halved, merge, refused, state, write_checkpoints
from safetensors.torch import load_file, save_file

from subspace_lab.merging import engine
from subspace_lab.merging.averaging import TaskArithmetic
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoints(tmp_path)


def test_methods_say_how_many_models_and_whether_a_base(folder: Path) -> None:
    refused(folder, "TaskArithmetic merges what models have changed: give merge.base", base=None)
    refused(folder, "SLERP merges exactly 2 models, got 3", method=SLERP())
    refused(folder, "give merge.base", "TIES merges at least 1 models, got 0", method=TIES(), base=None, models=[])


def test_everything_that_is_wrong_is_told_at_once(folder: Path) -> None:
    wrong = state(1)
    del wrong["norm"]
    wrong["layers.1.mlp.weight"] = torch.zeros(8, 16)
    wrong["head"] = torch.zeros(3)
    save_file(wrong, folder / "1.safetensors")
    save_file(state(2) | {"embed.weight": torch.zeros(22, 8)}, folder / "2.safetensors")
    save_file(state(3) | {"layers.0.mlp.weight": torch.zeros(16, 8, dtype=torch.int64)}, folder / "3.safetensors")
    refused(
        folder,
        "model 1 lacks tensor norm of the base",
        "model 1 has tensor head that the base lacks",
        "model 1: layers.1.mlp.weight is 16×8 in the base and 8×16 there",
        "model 2 has another vocabulary: embed.weight has 20 rows in the base and 22 there (merge.exclude",
        "model 3: layers.0.mlp.weight is float32 in the base and int64 there",
    )
    # What is excluded need not fit.
    merge(folder, exclude=["embed", "norm", "mlp", "head"])
    refused(folder, "tensors have other names than the base's: 'model.' before each", **_prefixed(folder))


def _prefixed(folder: Path) -> dict[str, Any]:
    save_file({f"model.{name}": W for name, W in state(1).items()}, folder / "named.safetensors")
    return {"models": [str(folder / "named.safetensors")], "output": "other"}


def test_tied_tensors_in_one_file_stay_one(folder: Path) -> None:
    """A head that is stored with some models and not with others says so."""
    save_file(state(0) | {"lm_head.weight": state(0)["embed.weight"].clone()}, folder / "base.safetensors")
    refused(
        folder, *[f"model {t} lacks tensor lm_head.weight of the base (a head tied to the embedding" for t in (1, 2, 3)]
    )


def _broken(folder: Path, how: str) -> Path:
    path = folder / "broken.safetensors"
    whole = (folder / "1.safetensors").read_bytes()
    path.write_bytes({"cut": whole[:-7], "header": whole[:20], "text": b"<html>no</html>", "empty": b""}[how])
    return path


@pytest.mark.parametrize("how", ["cut", "header", "text", "empty"])
def test_damaged_files_are_told(how: str, folder: Path) -> None:
    path = _broken(folder, how)
    refused(folder, f"{path} is damaged or no safetensors file", models=[str(path)])


def test_other_kinds_of_files_say_what_to_do(folder: Path) -> None:
    torch.save(state(1), folder / "1.bin")
    refused(folder, "save it as safetensors first", models=[str(folder / "1.bin")])
    (folder / "pickles").mkdir()
    torch.save(state(1), folder / "pickles" / "pytorch_model.bin")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, folder / "lora" / "adapter_model.safetensors")
    (folder / "empty").mkdir()
    names = ["pickles", "lora", "lora/adapter_model.safetensors", "empty"]
    words = [
        "only pickles",
        "a LoRA adapter (adapter_config.json)",
        "a LoRA adapter (x.lora_A.weight)",
        "no safetensors",
    ]
    refused(folder, *words, models=[str(folder / name) for name in names])


def test_misspelt_names_get_the_nearest(folder: Path) -> None:
    (folder / "experts").mkdir()
    save_file(state(1), folder / "experts" / "mnist.safetensors")
    refused(
        folder,
        "merge.base=",
        "did you mean 'mnist.safetensors'?",
        "did you mean 'experts'?",
        base=str(folder / "bse.safetensors"),
        models=[str(folder / "experts" / "mnst.safetensors"), str(folder / "expert" / "mnist.safetensors")],
    )


def test_a_hub_name_without_a_network_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(folder, "merge.models=nobody/nothing-here, no file here, from the hub", models=["nobody/nothing-here"])


def test_values_that_are_not_finite_leave_nothing(folder: Path) -> None:
    bad = state(2)
    bad["layers.1.mlp.weight"][3, 3] = float("nan")
    save_file(bad, folder / "2.safetensors")
    for method in (TaskArithmetic(), TIES(), Halved()):
        refused(folder, "tensor layers.1.mlp.weight of model 2 has 1 values that are not finite", method=method)


def test_ctrl_c_and_a_full_disk_leave_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(engine, "_deliver", interrupt)
        merge(folder, Halved())
    assert sorted(folder.iterdir()) == before

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr(os, "posix_fallocate", full)
        merge(folder)
    assert caught.value.errno == 28
    assert str(caught.value.filename).endswith("model.safetensors")
    assert sorted(folder.iterdir()) == before


def test_only_an_earlier_merge_is_replaced(folder: Path) -> None:
    merge(folder)
    first = load_file(folder / "out" / "model.safetensors")
    merge(folder, TaskArithmetic(0.6))
    assert not torch.equal(load_file(folder / "out" / "model.safetensors")["norm"], first["norm"])
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    refused(folder, "exists and is no earlier merge", output="mine")
    assert (folder / "mine" / "thesis.tex").exists()
