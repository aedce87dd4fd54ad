"""The .sid file and `subspace-lab compress`: what it writes is what it measured, damage is one line."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.cli import main
from subspace_lab.compression import compress as compressing
from subspace_lab.compression import quantize, sid
from subspace_lab.compression.certificate import certify
from subspace_lab.compression.evaluate import evaluate
from subspace_lab.compression.finetune import finetune
from subspace_lab.compression.rebuild import load as load_any
from subspace_lab.compression.rebuild import rebuild, restore
from subspace_lab.compression.solution import sha256
from subspace_lab.errors import UserError


@pytest.fixture(scope="module")
def packed(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantized = quantize.full_range(trained.solution.z.double().numpy(), 15)
    model, _ = restore(trained.solution)
    with torch.no_grad():
        model.z.copy_(torch.from_numpy(quantized.values()))
    path: Path = tmp_path_factory.mktemp("sid") / "small.sid"
    sid.compress(trained.solution, quantized, sha256(model.theta_exact())).save(path)
    return path


def test_rebuilds_the_quantised_model_from_the_file_alone(packed: Path, trained: Any) -> None:
    solution, size = load_any(packed)
    assert size == packed.stat().st_size < 900
    assert (
        np.abs(solution.z.numpy() - trained.solution.z.numpy()).max() <= np.abs(trained.solution.z.numpy()).max() / 13
    )
    weights = rebuild(solution)
    assert set(weights) == set(rebuild(trained.solution))


def test_payload_alone_is_far_below_a_byte_per_number(packed: Path) -> None:
    assert sid.load(packed).payload_bytes <= 38  # 60 numbers on 15 levels


def test_damaged_sid_files_are_one_line(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = packed.read_bytes()
    resealed = bytearray(good[:-4])
    resealed[7] = 0xFF  # a coding that does not exist, under a right checksum
    cases = {
        "flipped": good[:20] + bytes([good[20] ^ 4]) + good[21:],
        "short": good[:-9],
        "empty": good[:4],
        "newer": good[:4] + b"\x63" + good[5:],
        "impossible": bytes(resealed) + zlib.crc32(resealed).to_bytes(4, "little"),
    }
    for name, data in cases.items():
        file = tmp_path / f"{name}.sid"
        file.write_bytes(data)
        assert main(["rebuild", str(file)]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(file) in error and "Traceback" not in error
        assert ("newer" in error) == (name == "newer")


def test_a_payload_exchanged_under_a_right_checksum_fails_the_hash(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes()[:-4])
    length = data[5]
    data[6 + length // 2] ^= 1
    (tmp_path / "other.sid").write_bytes(bytes(data) + zlib.crc32(data).to_bytes(4, "little"))
    with pytest.raises(UserError, match="rebuilt weights differ"):
        rebuild(load_any(tmp_path / "other.sid")[0])


def test_command_writes_rows_the_best_file_and_verifies_it(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(trained.folder), "--levels", "5,15", "--choices", "3", "--delta", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "bound" in out and "verified" in out and "probability 0.9 " in out
    found = json.loads((trained.folder / compressing.FILE).read_text())
    certified = [row for row in found["rows"] if row["file_bytes"]]
    assert {row["coding"] for row in certified} >= {"full", "codebook"}
    assert found["choices"] == 3 and found["train_examples"] == 1437
    best = min(certified, key=lambda row: row["bound"])
    file = sid.load(trained.folder / sid.FILE)
    assert (file.payload_bytes, len(file.data)) == (best["payload_bytes"], best["file_bytes"])
    bench = compressing.open_run(trained.folder)
    model, _ = restore(file.solution)
    test, train = (evaluate(model, p) for p in (bench.data.test_dataloader(), bench.data.train_eval_dataloader()))
    assert test.accuracy == best["test_accuracy"] and test.examples == 360
    bound = certify(train.errors, 1437, file.payload_bytes, choices=3 * len(certified), delta=0.1).bound
    assert bound == best["bound"] > train.errors / 1437
    float32 = found["rows"][0]
    assert float32["coding"] == "float32" and float32["payload_bytes"] == 240
    assert float32["test_accuracy"] == evaluate(trained.model, bench.data.test_dataloader()).accuracy


def test_training_for_a_coarse_grid_wins_back_what_rounding_lost(trained: Any) -> None:
    bench = compressing.open_run(trained.folder)
    rows, _ = compressing.compress(bench, [3], epochs=6)
    by_name = {row.coding: row for row in rows}
    assert by_name["finetuned"].train_error < by_name["clipped"].train_error - 0.02
    assert by_name["finetuned"].payload_bytes <= by_name["clipped"].payload_bytes + 2


def test_finetuning_ends_on_the_grid_and_keeps_theta0(trained: Any) -> None:
    bench = compressing.open_run(trained.folder)
    theta0 = bench.model.theta0().clone()
    levels = quantize.clipped(bench.z, 7).levels
    batches = bench.data.train_dataloader()
    finetune(bench.model, levels, bench.data.task(), batches, steps=3, lr=0.1)
    assert set(bench.model.z.tolist()) <= set(levels.values().tolist())
    assert torch.equal(bench.model.theta0(), theta0) and not bench.model.training


def test_statistics_count_in_the_payload(trained: Any) -> None:
    solution = replace(trained.solution, buffers={"mean": torch.linspace(-1, 1, 50), "count": torch.tensor(300)})
    quantized = quantize.full_range(solution.z.double().numpy(), 9)
    with_buffers = sid.compress(solution, quantized, "0" * 64)
    without = sid.compress(trained.solution, quantized, "0" * 64)
    assert with_buffers.payload_bytes == without.payload_bytes + 1 + 100 + 1 + 2


def test_wrong_words_and_wrong_folders_are_one_line(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(trained.folder)
    for words in (
        [],
        [str(tmp_path)],
        [folder, "--levels", "1"],
        [folder, "--levels", "a"],
        [folder, "--bits", "20"],
        [folder, "--bits", "3", "--levels", "5"],
        [folder, "--delta", "2"],
        [folder, "--finetune", "-1"],
        [folder, "--nonsense"],
    ):
        assert main(["compress", *words]) == 2, words
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "solution.safetensors").write_bytes(trained.file.read_bytes())
    (tmp_path / "results.json").write_text('{"status": "interrupted", "metrics": {}}')
    assert main(["compress", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_completion_offers_the_commands_and_their_flags() -> None:
    from subspace_lab.completion import candidates

    assert {"rebuild", "compress"} <= set(candidates([""]))
    assert candidates(["compress", "--fi"]) == ["--finetune"]
    assert candidates(["rebuild", "run", ""]) == []
