"""Save, load, rebuild after training: the same bytes of θ, or one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from subspace_lab.cli import main
from subspace_lab.compression import rebuild as rebuilding
from subspace_lab.compression.rebuild import rebuild
from subspace_lab.compression.solution import Solution, sha256
from subspace_lab.errors import UserError


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.cpu().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def test_file_is_the_numbers_and_a_header(trained: Any) -> None:
    loaded = Solution.load(trained.file)
    assert torch.equal(loaded.z, trained.model.z) and loaded.lambdas is None
    assert {k: v for k, v in loaded.about().items() if k != "tensors"} == {
        k: v for k, v in trained.solution.about().items() if k != "tensors"
    }
    assert loaded.D == 1510 and loaded.d == 60
    assert [name for name, _, _ in loaded.tensors] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    header = int.from_bytes(trained.file.read_bytes()[:8], "little")
    assert trained.file.stat().st_size == 8 + header + 4 * 60 and header < 3000


def test_rebuilds_the_bytes_of_the_trained_model(trained: Any) -> None:
    assert trained.model.z.abs().max() > 0.1  # trained: at z = 0 any projection would do
    expected = bytes_of(trained.method.export(trained.model))
    before = torch.get_rng_state()
    assert bytes_of(rebuild(Solution.load(trained.file))) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_any_number_of_threads_whole_or_in_chunks(trained: Any, threads: int, dtype: torch.dtype) -> None:
    solution = Solution.load(trained.file)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, _ = rebuilding.restore(solution)
        theta0 = model.theta0()
        D = solution.D
        for cut in (1, 7, 64, 700, D - 1):
            parts = [
                model.projection.lift_exact(solution.z, base=theta0[a:b], rows=(a, b)) for a, b in ((0, cut), (cut, D))
            ]
            assert sha256(torch.cat(parts)) == solution.theta_sha256
        long = solution.z.to(dtype)
        whole = model.projection.lift_exact(long)
        assert torch.equal(torch.cat([model.projection.lift_exact(long, rows=r) for r in ((0, 33), (33, D))]), whole)
    finally:
        torch.set_num_threads(before)


class Normed(nn.Module):
    """Batch norm and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12)
        self.fixed = nn.Linear(12, 12).requires_grad_(False)
        self.last = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fixed(torch.relu(self.norm(self.first(x.flatten(1))))))


@pytest.fixture
def normed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: Callable[..., Any]) -> Any:
    import subspace_lab.models.mlp as module

    monkeypatch.setattr(module, "normed", lambda: Normed(), raising=False)
    return training(tmp_path / "normed", {"_target_": "subspace_lab.models.mlp.normed"}, d=30, variant="said", d_max=40)


def test_scales_statistics_and_frozen_weights_come_back(normed: Any) -> None:
    solution = Solution.load(normed.file)
    assert solution.d == 30 and solution.lambdas is not None and solution.lambdas.numel() == 3
    assert set(solution.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert bytes_of(rebuild(solution)) == bytes_of(normed.method.export(normed.model))
    other = replace(solution, frozen_sha256="0" * 64)
    with pytest.raises(UserError, match="θ0 could not be reproduced"):
        rebuild(other)


@pytest.mark.parametrize(
    "projection", ["fastfood", "fastfood_blocked", "dense", "gaussian", "sparse", "one_hot", "kronecker"]
)
def test_every_projection_rebuilds(projection: str, tmp_path: Path, training: Callable[..., Any], trained: Any) -> None:
    node = trained.solution.model["node"]
    run = training(tmp_path, node, steps=5, d=20, projection=projection)
    solution = Solution.load(run.file)
    theta = rebuilding.restore(solution)[0].theta()
    assert sha256(theta) == solution.theta_sha256
    assert torch.allclose(theta, run.model.theta(), rtol=1e-4, atol=1e-6)


def test_columns_per_layer_rebuild(tmp_path: Path, training: Callable[..., Any], trained: Any) -> None:
    run = training(tmp_path, trained.solution.model["node"], steps=5, d=20, scope="per_layer", variant="said")
    assert bytes_of(rebuild(Solution.load(run.file))) == bytes_of(run.method.export(run.model))


@pytest.mark.cuda
def test_the_gpu_rebuilds_the_same_bytes(trained: Any) -> None:
    assert bytes_of(rebuild(trained.solution, "cuda")) == bytes_of(rebuild(trained.solution))


def test_another_theta0_is_one_line_that_says_what_helps(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = replace(trained.solution, seed=4)
    lost.save(tmp_path / "lost.safetensors")
    assert main(["rebuild", str(tmp_path / "lost.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "θ0 could not be reproduced here" in error and "--theta0 FILE" in error

    model, _ = rebuilding.initial(trained.solution)
    save_file({n: p.detach().clone() for n, p in model.inner.named_parameters()}, tmp_path / "theta0.safetensors")
    words = ["rebuild", str(tmp_path / "lost.safetensors"), "--theta0", str(tmp_path / "theta0.safetensors")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert bytes_of(weights) == bytes_of(trained.method.export(trained.model))

    with torch.no_grad():
        wrong = {n: p.detach() + 1 for n, p in model.inner.named_parameters()}
    save_file(wrong, tmp_path / "theta0.safetensors")
    assert main(words) == 2
    assert "not the initial weights" in capsys.readouterr().err


def test_command_says_size_hash_and_place(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rebuild", str(trained.folder), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    size = trained.file.stat().st_size
    assert "D = 1,510" in out and f"{size:,} bytes" in out and trained.solution.theta_sha256 in out
    assert out.splitlines()[-1] == str(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_damaged_foreign_and_newer_files_are_one_line(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = trained.file.read_bytes()
    about = json.dumps(trained.solution.about())
    z = {"z": torch.zeros(60)}
    cases = {
        "": "damaged",
        "short": good[: len(good) // 2],
        "flipped": good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
        "text": b"hello, this is no safetensors file at all",
        "foreign": save({"weight": torch.zeros(3)}),
        "other": save(z, {"format": "galore/basis", "version": "1"}),
        "newer": save(z, {"format": "subspace-lab/intrinsic_dimension", "version": "99", "about": about}),
        "edited": good.replace(b'\\"seed\\":3', b'\\"seed\\":5', 1),
    }
    assert cases["edited"] != good
    for name, data in cases.items():
        if not name:
            continue
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(data)  # type: ignore[arg-type]
        assert main(["rebuild", str(file)]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(file) in error, error
    assert main(["rebuild", str(tmp_path / "absent")]) == 2
    assert main(["rebuild", str(tmp_path)]) == 2
    assert "no solution.safetensors" in capsys.readouterr().err
    assert main(["rebuild"]) == 2 and main(["rebuild", str(trained.file), "--what"]) == 2
    assert main(["rebuild", str(trained.file), "--device", "abacus"]) == 2


def test_a_file_cannot_have_just_anything_called(trained: Any, tmp_path: Path) -> None:
    for node in (
        {"_target_": "os.system", "command": "true"},
        {**trained.solution.model["node"], "hidden": [{"_target_": "os.getcwd"}]},
    ):
        evil = replace(trained.solution, model={"node": node, "arguments": {}})
        with pytest.raises(UserError, match="asks to call os"):
            rebuild(evil)


def test_a_projection_of_another_version_is_refused(trained: Any) -> None:
    with pytest.raises(UserError, match="needs version 2 of projection=orthoblock"):
        rebuild(replace(trained.solution, projection_version=2))
    with pytest.raises(UserError, match="is not the one the solution was trained in"):
        rebuild(replace(trained.solution, method=trained.solution.method | {"seed": 9}))


def test_an_earlier_solution_stays_when_writing_fails(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "solution.safetensors"
    trained.solution.save(file)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        replace(trained.solution, seed=1).save(file)
    assert Solution.load(file).seed == trained.solution.seed
