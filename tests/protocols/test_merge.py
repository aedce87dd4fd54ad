"""`protocol=merge` from the command line: experts trained once, merged, measured; what does not fit is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspace_lab import cli

TINY = [
    "data.views=[rot90,invert]",
    "data.pretrain=40",
    "data.train=64",
    "data.validation=60",
    "data.batch_size=32",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "trainer.max_steps=6",
    "trainer.progress=off",
]

Merge = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tests of this file share, so that experts are trained once."""
    return tmp_path_factory.mktemp("merge")


@pytest.fixture
def merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """merge(method, words…): results.json of a tiny merge."""
    monkeypatch.chdir(place)

    def run(method: str, *words: str, name: str = "run", code: int = 0) -> dict[str, Any]:
        folder = place / f"{method}_{name}"
        assert cli.main([f"method={method}", *TINY, *words, f"hydra.run.dir={folder}"]) == code
        found: dict[str, Any] = json.loads((folder / "results.json").read_text()) if code == 0 else {}
        return found

    return run


def test_results_hold_accuracies_of_base_experts_and_merged_absolute_and_normalised(merge: Merge, place: Path) -> None:
    found = merge("task_arithmetic", "protocol.scales=[0.5,1.0]")
    section, metrics = found["merge"], found["metrics"]
    assert section["tasks"] == ["rot90", "invert"] and section["family"] == "digits_tasks"
    accuracies = [section["merged"][task]["accuracy"] for task in section["tasks"]]
    experts = [section["experts"][task]["accuracy"] for task in section["tasks"]]
    assert metrics["merged/accuracy"] == pytest.approx(sum(accuracies) / 2)
    shares = [a / e for a, e in zip(accuracies, experts, strict=True)]
    assert metrics["merged/normalized_accuracy"] == pytest.approx(sum(shares) / 2)
    assert metrics["merged/worst_normalized_accuracy"] == pytest.approx(min(shares))
    assert found["objective"] == "merged/error" and metrics["merged/error"] == pytest.approx(1 - sum(accuracies) / 2)
    cosines = torch.tensor(section["task_vectors"]["cosines"])
    torch.testing.assert_close(cosines.diagonal(), torch.ones(2))
    assert cosines[0, 1] == cosines[1, 0] and abs(cosines[0, 1]) < 1
    assert section["scale"]["chosen"] == "validation" and [s for s, _ in section["scale"]["curve"]] == [0.5, 1.0]
    for of in ("base", "merged", "experts"):
        for task in section["tasks"]:
            assert sum(section[of][task]["marginals"]) == pytest.approx(1)
    folder = place / "task_arithmetic_run"
    assert (folder / "plots" / "merge.png").stat().st_size > 10_000
    assert (folder / "metrics.csv").is_file()


def test_merged_weights_are_the_rule_applied_to_the_kept_experts(merge: Merge, place: Path) -> None:
    merge("task_arithmetic", "protocol.scales=null", "method.scale=0.4", name="given")
    (folder,) = (place / "outputs" / "experts").iterdir()
    base = load_file(folder / "pretraining" / "export" / "model.safetensors")
    experts = [load_file(path) for path in sorted(folder.glob("*_[12]*/export/model.safetensors"))]
    assert len(experts) == 2
    merged = load_file(place / "task_arithmetic_given" / "export" / "model.safetensors")
    assert not any(name.startswith("head") for name in merged)
    for name, W in merged.items():
        wanted = base[name] + 0.4 * sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(W, wanted, atol=2e-6, rtol=1e-5)
        assert not torch.equal(W, base[name]) or name.endswith("num_batches_tracked")


def test_experts_are_trained_once_for_all_methods_and_not_for_another_seed(
    merge: Merge, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge("task_arithmetic", name="first")
    known = set((place / "outputs" / "experts").iterdir())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    from subspace_lab.protocols.experts import ExpertFit

    with monkeypatch.context() as patched:
        patched.setattr(ExpertFit, "run", refuse)
        first, again = merge("simple_average", name="a"), merge("simple_average", name="b")
    assert first["merge"]["merged"] == again["merge"]["merged"]
    merge("simple_average", "seed=1", name="c")
    assert len(set((place / "outputs" / "experts").iterdir()) - known) == 1


def test_scale_zero_is_the_base_and_one_task_at_scale_one_its_expert(merge: Merge) -> None:
    none = merge("task_arithmetic", "protocol.scales=null", "method.scale=0", name="zero")["merge"]
    assert none["merged"] == none["base"]
    alone = merge("task_arithmetic", "protocol.scales=null", "method.scale=1", "data.views=[rot90]", name="one")[
        "merge"
    ]
    assert alone["merged"]["rot90"]["accuracy"] == alone["experts"]["rot90"]["accuracy"]


def test_a_method_that_learns_says_what_it_found_and_keeps_it(merge: Merge, place: Path) -> None:
    found = merge("adamerging", "method.steps=3")
    assert found["merge"]["transductive"] is True and found["merge"]["scale"]["chosen"] == "none"
    assert found["merge"]["learned"]
    kept = load_file(place / "adamerging_run" / "learned.safetensors")
    assert kept and all(torch.isfinite(tensor.float()).all() for tensor in kept.values())


def test_experts_by_task_from_files_are_measured_and_agree_with_those_trained(merge: Merge, place: Path) -> None:
    trained = merge("iso_c", "protocol.scales=null")["merge"]
    folder = next(f for f in (place / "outputs" / "experts").iterdir() if list(f.glob("invert_*")))
    files = {path.parent.parent.name.split("_")[0]: path for path in folder.glob("*_[12]*/export/model.safetensors")}
    base = folder / "pretraining" / "export" / "model.safetensors"
    models = ",".join(f"{task}:{path}" for task, path in files.items())
    given = merge("iso_c", "protocol.scales=null", f"merge.base={base}", f"merge.models={{{models}}}", name="given")
    assert given["merge"]["merged"] == trained["merged"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=task_arithmetic", "data=digits"], "protocol=merge needs several tasks"),
        (
            ["method=slerp", "data.views=[rot90,hflip,vflip]"],
            "slerp merges 2 models, and data=digits_tasks has 3 tasks",
        ),
        (["method=task_arithmetic", "data=digits_pair"], "needs what the models were fine-tuned from"),
        (["method=galore", "data=digits_tasks", "model=mlp"], "several tasks whose experts are to be merged"),
        (["method=none", "merge=default", "data=digits", "model=mlp"], "merge is for protocol=merge"),
        (["method=task_arithmetic", "protocol=fit"], "runs with protocol=merge"),
        (["method=task_arithmetic", "data.views=[rot90,invret]"], "'invert'"),
        (["method=task_arithmetic", "merge.models={rot90:a,invert:b}"], "no checkpoint for task 'rot180'"),
        (["method=task_arithmetic", "trainer=ddp", "trainer.devices=2"], "runs in one process"),
        (["method=task_arithmetic", "estimate=true"], "merges what is trained"),
        (["method=task_arithmetic", "protocol.scales=[]"], "protocol.scales"),
        (["method=task_arithmetic", "protocol.gamma=0"], "protocol.gamma=0"),
        (["method=iso_c", "data.train=1700"], "1797 images in all"),
        (["method=iso_c", "data=image_tasks", "data.sets=[mnist,kmist]"], "'kmnist'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "trainer.progress=off"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in shown if not line.startswith("hint")]) == 1 and said in " ".join(shown)


def test_an_interrupted_merge_keeps_its_experts_and_goes_on(
    merge: Merge, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from subspace_lab.merging.averaging import TaskArithmetic

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TaskArithmetic, "update", stop)
        merge("task_arithmetic", name="cut", code=130)
    assert "continue with: subspace-lab resume" in capsys.readouterr().err
    assert cli.main(["resume", str(place / "task_arithmetic_cut")]) == 0
    found = json.loads((place / "task_arithmetic_cut" / "results.json").read_text())
    assert found["status"] == "completed"
    assert found["merge"]["merged"] == merge("task_arithmetic", name="uncut")["merge"]["merged"]
