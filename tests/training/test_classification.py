"""Classification in whole runs: exact figures, exact resumption, and what the tables, plots and exports show."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.errors import Interrupted, UserError
from subspace_lab.training.tasks import Classification

WORDS = (
    "data=digits",
    "model=mlp",
    "model.hidden=[32]",
    "method=none",
    "optimizer.lr=0.01",
    "trainer=cpu",
    "trainer.max_steps=30",
    "trainer.val_every=10",
    "trainer.checkpoint_every=7",
    "trainer.log_every=1",
    "trainer.progress=off",
    "compare=null",
    "export=false",
)


class Runs:
    def __init__(self, root: Path) -> None:
        self.root, self.words = root, WORDS

    def fit(self, folder: str, *words: str) -> Any:
        from subspace_lab.app import compose_config
        from subspace_lab.protocols.fit import Fit

        cfg = compose_config([*self.words, f"paths.output_dir={self.root}", *words])
        run_dir = self.root / folder
        run_dir.mkdir(exist_ok=True)
        return Fit(**{k: v for k, v in cfg.protocol.items() if k != "_target_"}).run(
            cfg, run_dir, label=folder, resume_dir=run_dir
        )

    def rows(self, folder: str) -> list[dict[str, str]]:
        with (self.root / folder / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if "per_second" not in k and v} for row in csv.DictReader(file)]

    def weights(self, folder: str) -> dict[str, Any]:
        from subspace_lab.training import checkpoint

        return dict(checkpoint.load(checkpoint.list_checkpoints(self.root / folder)[0])["state_dict"])


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_figures_are_exact_sums() -> None:
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), Classification()
    images, labels = torch.randn(23, 1, 2, 3), torch.randint(0, 4, (23,))
    labels[5] = -100
    logits = model(images).double().log_softmax(-1)
    real = labels != -100
    loss = -logits[real].gather(1, labels[real][:, None]).mean().item()
    accuracy = (logits.argmax(-1) == labels)[real].double().mean().item()

    def figures(*cuts: int) -> dict[str, float]:
        sums = [task.sums(torch.device("cpu")) for _ in range(2)]
        for index, (part, marks) in enumerate(zip(images.split(cuts), labels.split(cuts), strict=True)):
            sums[index % 2].add(*task.measure(model, {"inputs": part, "labels": marks}))
        return task.figures(sums[0].local() + sums[1].local(), "test")

    for cuts in ((23,), (7, 16), (5, 1, 17)):  # in the last, a batch of the one image that does not count
        found = figures(*cuts)
        assert found["test/accuracy"] == accuracy  # not approximately
        assert found["test/loss"] == pytest.approx(loss, rel=1e-6)
    empty = task.figures(task.sums(torch.device("cpu")).local(), "val")
    assert math.isnan(empty["val/accuracy"]) and math.isnan(empty["val/loss"])
    assert task.loss(model, {"inputs": images, "labels": labels}).item() == pytest.approx(loss, rel=1e-5)
    assert task.size({"inputs": images, "labels": labels}) == 23


def test_losses_against_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    images, labels = torch.randn(9, 1, 2, 3), torch.randint(0, 4, (9,))
    shares = torch.rand(9, 4).softmax(1)
    logits, one_hot = model(images), nn.functional.one_hot(labels, 4).float()
    entropy, binary = nn.functional.cross_entropy, nn.functional.binary_cross_entropy_with_logits

    def loss(target: torch.Tensor, *options: Any) -> float:
        return Classification(*options).loss(model, {"inputs": images, "labels": target}).item()

    assert loss(labels) == loss(labels, "cross_entropy", 0.0) == entropy(logits, labels).item()  # not approximately
    assert loss(labels, "bce") == pytest.approx(binary(logits, one_hot).item(), rel=1e-6)
    assert loss(shares) == pytest.approx(entropy(logits, shares).item(), rel=1e-6)
    assert loss(shares.double()) == pytest.approx(loss(shares), rel=1e-6)
    assert loss(shares, "bce") == pytest.approx(binary(logits, shares).item(), rel=1e-6)
    for target, plain in ((labels, one_hot), (shares, shares)):
        smooth = 0.9 * plain + 0.1 / 4
        assert loss(target, "cross_entropy", 0.1) == pytest.approx(entropy(logits, smooth).item(), rel=1e-5)
        assert loss(target, "bce", 0.1) == pytest.approx(binary(logits, smooth).item(), rel=1e-5)
    assert loss(one_hot) == pytest.approx(loss(labels), rel=1e-6)
    holed = labels.clone()
    holed[2] = holed[7] = -100
    real = holed != -100
    assert loss(holed, "bce") == pytest.approx(binary(logits[real], one_hot[real]).item(), rel=1e-6)
    task = Classification("bce", 0.1)  # evaluation knows nothing of the smoothing
    sums = task.sums(torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 9)):
        sums.add(*task.measure(model, {"inputs": images[part], "labels": holed[part]}))
    found = task.figures(sums.local(), "val")
    assert found["val/loss"] == pytest.approx(binary(logits[real], one_hot[real]).item(), rel=1e-6)
    assert found["val/accuracy"] == (logits.argmax(-1) == labels)[real].double().mean().item()


def test_a_run_learns_and_tells_all_parts(runs: Runs) -> None:
    outcome = runs.fit("run", "trainer.max_steps=150", "protocol.train_accuracy=true", "trainer.val_every=50")
    metrics = outcome.metrics
    assert metrics["test/accuracy"] > 0.9 and metrics["train/accuracy"] > 0.95 and metrics["val/accuracy"] > 0.9
    assert {"val/loss", "test/loss", "train/loss", "train/examples_per_second"} <= metrics.keys()
    assert not any("token" in name or "perplexity" in name for name in metrics)
    assert (metrics["test/accuracy"] * 360).is_integer() or abs(metrics["test/accuracy"] * 360 % 1 - 1) < 1e-9
    assert outcome.objective == "val/loss" and outcome.timing["examples"] == 150 * 128
    assert outcome.data["test"]["examples"] == 360 and len(outcome.data["train"]["hash"]) == 32
    last = runs.rows("run")[-1]
    assert float(last["test/accuracy"]) == metrics["test/accuracy"]
    plain = runs.fit("plain", "trainer.max_steps=150", "trainer.val_every=50")
    assert "train/accuracy" not in plain.metrics and plain.metrics["test/accuracy"] == metrics["test/accuracy"]


@pytest.mark.parametrize(
    ("where", "step", "augment"), [("step", 9, "none"), ("validation", 10, "none"), ("step", 16, "crop_flip")]
)
def test_interrupt_and_resume_equals_uninterrupted(
    runs: Runs, stop_at: Any, where: str, step: int, augment: str
) -> None:
    words = (f"data.augment={augment}",)
    whole = runs.fit("whole", *words)
    stop_at(step, where)
    with pytest.raises(Interrupted, match=f"interrupted after step {step} of 30"):
        runs.fit("cut", *words)
    stop_at.reset()
    resumed = runs.fit("cut", *words, "resume=auto")
    for name in ("val/loss", "val/accuracy", "test/loss", "test/accuracy"):
        assert whole.metrics[name] == resumed.metrics[name]
    assert runs.rows("whole") == runs.rows("cut")
    left, right = runs.weights("whole"), runs.weights("cut")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_augmented_folder_of_images_resumes_exactly(runs: Runs, stop_at: Any, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("val", 10)):
        for label in range(3):
            folder = tmp_path / "tree" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(40 * label, 60 + 60 * label, (14, 14, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    words = (
        f"data.root={tmp_path}/tree",
        f"paths.cache_dir={tmp_path}/cache",
        "data.image_size=12",
        "data.batch_size=8",
    )
    words += ("data.augment=rand_augment", "data.erasing=0.25", "data.mixup=0.2", "data.cutmix=1", "data.loss=bce")
    runs.words = ("data=image_folder", *(word for word in WORDS if word != "data=digits"), *words)
    whole = runs.fit("whole", "data.num_workers=2")
    stop_at(16, "step")
    with pytest.raises(Interrupted, match="interrupted after step 16 of 30"):
        runs.fit("cut", "data.num_workers=1")
    stop_at.reset()
    resumed = runs.fit("cut", "data.num_workers=0", "resume=auto")
    assert whole.metrics["test/loss"] == resumed.metrics["test/loss"]
    assert whole.data["parts"]["test"] == "val" and whole.data["test"]["examples"] == 30
    left, right = runs.weights("whole"), runs.weights("cut")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_batchnorm_is_in_evaluation_mode_and_survives(runs: Runs) -> None:
    runs.words = tuple(word for word in WORDS if not word.startswith("model"))
    words = ("model=small_cnn", "model.width=4", "trainer.max_steps=12")
    first = runs.fit("run", *words)
    again = runs.fit("run", *words, "resume=auto")
    assert first.metrics["test/loss"] == again.metrics["test/loss"]
    assert any(name.endswith("running_mean") for name in runs.weights("run"))


def test_epochs_decide_the_steps(runs: Runs) -> None:
    outcome = runs.fit("run", "trainer.max_epochs=2")
    assert outcome.timing["steps"] == math.ceil(2 * 1293 / 128) == 21
    from subspace_lab.training.trainer import TrainerPlan

    with pytest.raises(UserError, match=r"trainer\.max_epochs=1, but streamed text has no known length"):
        TrainerPlan(max_epochs=1).settle_length(None, 8, 1)
    with pytest.raises(UserError, match=r"trainer\.max_epochs is 0"):
        TrainerPlan(max_epochs=0)


def test_images_use_their_own_budget(runs: Runs) -> None:
    from subspace_lab.app import compose_config

    def trainer(*words: str) -> Any:
        return compose_config([*words, "method=none", "paths.output_dir=."]).trainer

    digits, mnist = trainer("data=digits", "model=mlp"), trainer("data=mnist", "model=fc")
    assert (digits.max_steps, digits.val_every) == (1200, 600) and (mnist.max_steps, mnist.val_every) == (4300, 2150)
    assert trainer("data=c4", "model=llama_60m").max_steps == 10000


def test_progress_lines(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.fit("run", "trainer.progress=lines")
    told = capfd.readouterr().err
    assert "val acc 0." in told and "examples/s" in told and "tokens" not in told and "ppl" not in told


def test_plot_and_tables_show_accuracy(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from subspace_lab.reporting import plots, tables

    outcome = runs.fit("run")
    drawn: list[tuple[str, str]] = []
    from matplotlib.figure import Figure

    save = Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.extend((axes.get_ylabel(), axes.get_yscale()) for axes in self.axes)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert plots.draw_loss([("adamw", runs.root / "run")], runs.root / "loss.png", "title") is not None
    assert drawn == [("training loss (nats per example)", "linear"), ("validation accuracy", "linear")]
    console = Console(width=200, record=True)
    console.print(tables.comparison([("adamw", outcome.metrics)]))
    text = console.export_text()
    assert "validation accuracy" in text and "test accuracy" in text and "examples/s" in text


def test_estimate_and_export(runs: Runs) -> None:
    from safetensors.torch import load_file

    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate

    memory = estimate(compose_config([*WORDS, "paths.output_dir=."]), [])
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    assert memory.parameters == parameters and memory.weights == memory.gradients == 4 * parameters
    assert memory.state == pytest.approx(8 * parameters, rel=0.01)
    assert memory.activations >= 4 * 128 * (64 + 32)
    half = estimate(compose_config([*WORDS, "trainer.precision=bf16-true", "paths.output_dir=."]), [])
    assert half.weights == memory.weights // 2
    runs.fit("run", "export=true")
    exported, trained = load_file(runs.root / "run/export/model.safetensors"), runs.weights("run")
    assert {f"model.{name}" for name in exported} == set(trained)
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in exported.items())


def test_low_precision_trains(runs: Runs) -> None:
    full = runs.fit("full", "trainer.max_steps=60").metrics["val/loss"]
    low = runs.fit("low", "trainer.max_steps=60", "trainer.precision=bf16-true").metrics["val/loss"]
    assert low == pytest.approx(full, rel=0.3)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from subspace_lab.cli import main

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["subspace-lab", *words])
        return main(list(words))

    monkeypatch.chdir(tmp_path)
    where = f"hydra.run.dir={tmp_path}/run"
    assert run(*WORDS, where) == 0
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert found["status"] == "completed" and found["metrics"]["test/accuracy"] > 0.5
    assert "test accuracy" in capsys.readouterr().out
    assert run(*WORDS, where.replace("run/", "x/"), "data.batch_size=5000") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "digits has only 1293 training examples" in told
    assert run(*WORDS, "data.dataset=digit") == 2
    assert "data.dataset" in capsys.readouterr().err
