"""protocol=transfer in whole runs: figures, rows, resumption, and every mistake told before training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.errors import Interrupted, UserError

WORDS = (
    "protocol=transfer",
    "data=digits",
    "model=mlp",
    "model.hidden=[32,24]",
    "method=none",
    "optimizer.lr=0.01",
    "trainer=cpu",
    "trainer.max_steps=60",
    "trainer.val_every=30",
    "trainer.checkpoint_every=20",
    "trainer.progress=off",
    "compare=null",
    "export=false",
)
REST = "protocol.probes={rest: {data: digits, classes: [5,6,7,8,9], val_size: 0}}"
FIGURES = ("intra_class_angle", "class_separation", "sparsity", "rankme", "stable_rank")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """run(folder, *words): the outcome of the protocol in a folder."""

    def fit(folder: str, *words: str) -> Any:
        from subspace_lab import build, schema
        from subspace_lab.app import compose_config

        cfg = compose_config([*WORDS, f"paths.output_dir={tmp_path}", f"paths.data_dir={tmp_path}/data", *words])
        schema.validate(cfg)
        (tmp_path / folder).mkdir(exist_ok=True)
        protocol = build.instantiate(cfg.protocol)
        return protocol.run(cfg, tmp_path / folder, label=folder, resume_dir=tmp_path / folder)

    return fit


def last_row(folder: Path) -> dict[str, str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def test_train_on_some_classes_and_probe_others(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("run", "data.classes=[0,1,2,3,4]", REST)
    metrics, details = outcome.metrics, outcome.sections["probes"]
    assert metrics["test/accuracy"] > 0.95
    assert 0.8 < metrics["probe/rest/accuracy"] == metrics["probe/accuracy"] == details["rest"]["accuracy"] < 1
    assert details["rest"]["features"] == 24 and details["rest"]["converged"]
    assert 10 < metrics["features/intra_class_angle"] < 90 and 0 < metrics["features/class_separation"] < 1
    assert 0 < metrics["features/sparsity"] < 1, "the head's input comes from a ReLU"
    assert 1 < metrics["features/stable_rank"] < metrics["features/rankme"] < 24
    row = last_row(tmp_path / "run")
    assert int(row["step"]) == 60 == outcome.timing["steps"]
    for name in ("test/accuracy", "probe/accuracy", "probe/rest/accuracy", *(f"features/{name}" for name in FIGURES)):
        assert float(row[name]) == metrics[name], name


def test_the_figures_are_those_of_the_trained_features(run: Callable[..., Any], tmp_path: Path) -> None:
    from subspace_lab.analysis.features import statistics
    from subspace_lab.analysis.probe import linear_probe
    from subspace_lab.data.images import ImageDataModule
    from subspace_lab.training import checkpoint

    outcome = run("run", "protocol.probe_examples=500", "protocol.classifier=svm")
    assert [name for name in outcome.metrics if name.startswith("probe/")] == [
        "probe/digits/accuracy",
        "probe/accuracy",
    ]
    weights = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "run")[0])["state_dict"]
    module = ImageDataModule()
    module.configure(0, 1, 0)
    module.setup()

    def features(examples: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch = examples.batch(rows)
        x = batch["inputs"].flatten(1)
        for layer in (1, 3):
            x = (x @ weights[f"model.{layer}.weight"].T + weights[f"model.{layer}.bias"]).relu()
        return x, batch["labels"]

    test, labels = features(module.parts.test, np.arange(360))
    assert {f"features/{k}": v for k, v in statistics(test, labels).items()} == pytest.approx(
        {name: value for name, value in outcome.metrics.items() if name.startswith("features/")}, rel=1e-5
    )
    from subspace_lab.data.splits import stratified

    own = module.parts.train
    chosen = np.flatnonzero(stratified(own.labels[own.rows].numpy(), 500, "probe_examples"))  # type: ignore[attr-defined]
    arrays = (tensor.numpy() for tensor in (*features(own, chosen), test, labels))
    found = linear_probe(*arrays, classifier="svm")
    assert found.train_examples == 500
    assert outcome.metrics["probe/digits/accuracy"] == pytest.approx(found.accuracy, abs=0.003)


def test_evaluation_does_not_change_training(run: Callable[..., Any], tmp_path: Path) -> None:
    from subspace_lab.training import checkpoint

    plain = run("plain", "protocol=fit")
    probed = run("probed")
    names = [name for name in plain.metrics if "per_second" not in name]
    assert {name: probed.metrics[name] for name in names} == {name: plain.metrics[name] for name in names}
    left, right = (
        checkpoint.load(checkpoint.list_checkpoints(tmp_path / name)[0])["state_dict"] for name in ("plain", "probed")
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("where", ["training", "test", "probe"])
def test_interrupt_and_resume(
    where: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Callback

    from subspace_lab import interrupt
    from subspace_lab.analysis import probe
    from subspace_lab.training.callbacks.method import MethodDriver
    from subspace_lab.training.module import ExperimentModule

    whole = run("whole")
    linear_probe, test_step, end = probe.linear_probe, ExperimentModule.test_step, MethodDriver.on_train_batch_end

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def ask(self: Callback, trainer: Any, *args: Any) -> None:
        end(self, trainer, *args)  # type: ignore[arg-type]
        interrupt.request.signal = 2 if trainer.global_step == 30 else None

    if where == "probe":
        monkeypatch.setattr(probe, "linear_probe", stop)
    elif where == "test":
        monkeypatch.setattr(ExperimentModule, "test_step", stop)
    else:
        monkeypatch.setattr(MethodDriver, "on_train_batch_end", ask)
    told = "after step 30 of 60" if where == "training" else "during the evaluation, the training is saved"
    with pytest.raises(Interrupted, match=f"{told}.*subspace-lab resume {tmp_path}/cut"):
        run("cut")
    monkeypatch.setattr(probe, "linear_probe", linear_probe)
    monkeypatch.setattr(ExperimentModule, "test_step", test_step)
    monkeypatch.setattr(MethodDriver, "on_train_batch_end", end)
    interrupt.request.signal = None
    resumed = run("cut", "resume=auto")
    # The last logged loss is not kept in checkpoints.
    same = [name for name in whole.metrics if "per_second" not in name and name != "train/loss"]
    assert {name: resumed.metrics[name] for name in same} == {name: whole.metrics[name] for name in same}
    assert float(last_row(tmp_path / "cut")["probe/accuracy"]) == whole.metrics["probe/accuracy"]


def test_other_sizes_are_shown_as_the_model_wants_them(run: Callable[..., Any], tmp_path: Path) -> None:
    """A model of 8×8 digits looks at a data set of 28×28 pixels in files, found below this run's paths.data_dir."""
    raw = tmp_path / "data/fashion_mnist/FashionMNIST/raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 200), ("t10k", 60)):
        labels = np.arange(count, dtype=np.uint8) % 4
        images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[7 * label : 7 * label + 7] += 150
        head = np.array([0x00000803, count, 28, 28], dtype=">u4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], dtype=">u4").tobytes() + labels.tobytes()
        )
    words = "protocol.probes={clothes: {data: fashion_mnist, val_size: 0}, digits: {}}"
    outcome = run("run", words)
    assert outcome.metrics["probe/clothes/accuracy"] > 0.9
    assert outcome.sections["probes"]["clothes"]["train_examples"] == 200
    names = ("probe/clothes/accuracy", "probe/digits/accuracy")
    assert outcome.metrics["probe/accuracy"] == pytest.approx(sum(outcome.metrics[name] for name in names) / 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["protocol.probes=[digit]"], "protocol.probes, digit: .*no data 'digit'.*did you mean 'digits'"),
        (["protocol.probes=[text]"], "protocol.probes, text: data=text has no images"),
        (["protocol.probes=[cartpole]"], "protocol.probes, cartpole: data=cartpole has no images"),
        (["protocol.probes={a: {data: digits, clases: [1]}}"], "protocol.probes, a: .*did you mean 'data.classes'"),
        (["protocol.probes={a: {data: digits, classes: [77, 1]}}"], "protocol.probes, a: .*no class 77"),
        (["protocol.probes={a: digits}"], "expected options.*a: {data: digits}"),
        (["protocol.probes=[mnist]"], "protocol.probes, mnist: "),
        (["protocol.probe_examples=1"], "protocol.probe_examples=1: expected at least 2"),
        (["data=text", "model=llama_tiny"], "features of images, and the data are something else"),
    ],
)
def test_mistakes_are_told_before_training(
    words: list[str], told: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Trainer

    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("training has begun")

    if "data=text" in words:
        (tmp_path / "a.txt").write_text("the quick brown fox\n" * 2000)
        words = [*words, f"data.files=[{tmp_path}/a.txt]", f"paths.cache_dir={tmp_path}"]
        monkeypatch.setattr(f"{__name__}.WORDS", tuple(word for word in WORDS if not word.startswith("model")))
    monkeypatch.setattr(Trainer, "fit", never)
    with pytest.raises(UserError, match=told) as caught:
        run("run", *words)
    assert "\n" not in str(caught.value)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from subspace_lab.cli import main

    def command(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["subspace-lab", *words])
        return main(list(words))

    monkeypatch.chdir(tmp_path)
    where = f"hydra.run.dir={tmp_path}/run"
    assert command(*WORDS, where, "trainer.progress=lines", "data.classes=[0,1,2]", REST) == 0
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert found["probes"]["rest"]["test_examples"] == 180 and found["status"] == "completed"
    printed = capsys.readouterr()
    assert "probe accuracy" in printed.out and "intra-class angle, °" in printed.out
    assert "probe rest: accuracy 0." in printed.err
    assert command(*WORDS, f"hydra.run.dir={tmp_path}/other", "protocol.probes=[mnits]") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "did you mean 'mnist'" in told
    assert not (tmp_path / "other").exists()
    assert command(*WORDS, "protocol.probe=[mnist]") == 2
    assert "did you mean 'protocol.probes'" in capsys.readouterr().err


@pytest.mark.slow
def test_ddp_measures_the_same_once(tmp_path: Path, run: Callable[..., Any]) -> None:
    import os
    import subprocess
    import sys

    words = [*WORDS, f"hydra.run.dir={tmp_path}/two", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    words[words.index("trainer=cpu")] = "data.batch_size=64"
    done = subprocess.run(
        [sys.executable, "-m", "subspace_lab", *words, REST],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two/results.json").read_text())["metrics"]
    alone = run("one", REST).metrics
    assert abs(found["probe/rest/accuracy"] - alone["probe/rest/accuracy"]) < 0.03
    assert found["features/intra_class_angle"] == pytest.approx(alone["features/intra_class_angle"], rel=0.02)
