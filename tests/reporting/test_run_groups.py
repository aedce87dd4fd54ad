"""Which runs the report averages, what it tells them apart by, and the plot over k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subspace_lab.reporting import grouping, report, tables, transfer_plot


def write(folder: Path, seed: int, *typed: str, method: str = "gcr", **metrics: float) -> dict[str, Any]:
    found = {
        "schema_version": 1,
        "status": "completed",
        "method": method,
        "seed": seed,
        "choices": {"method": method, "optimizer": "sgd", "model": "mlp", "data": "digits"},
        "overrides": [f"method={method}", f"seed={seed}", "optimizer=sgd", *typed],
        "timing": {"steps": 60},
        "metrics": {name.replace("__", "/"): value for name, value in metrics.items()},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    return found


def test_a_sweep_over_k_is_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k, accuracies in ((1, (0.70, 0.72)), (4, (0.90, 0.94))):
        for seed, accuracy in enumerate(accuracies):
            write(tmp_path / f"{k}_{seed}", seed, f"method.k={k}", "trainer.max_steps=60", val__accuracy=accuracy)
    assert report.main([tmp_path]) == 0
    printed = capsys.readouterr()
    assert "0.710 ± 0.014" in printed.out and "0.920 ± 0.028" in printed.out and "settings" in printed.out
    lines = [line.split() for line in printed.out.splitlines() if line.strip().startswith("gcr")]
    assert [line[1] for line in lines] == ["k=4", "k=1"], "best first"
    assert not list(tmp_path.glob("*.png")) and not printed.err, "no figures of features"


def test_repetitions_are_one_group() -> None:
    def of(*typed: str, **more: Any) -> grouping.Group:
        return grouping.group_of({"method": "gcr", "overrides": [*typed], "metrics": {}, **more})

    base = of("method=gcr", "method.k=4", "optimizer.lr=0.001")
    asides = ("seed=3", "name=x", "tags=[a]", "resume=auto", "paths.output_root=/x", "hydra.run.dir=y", "export=false")
    more = ("logger=both", "trainer.progress=off", "trainer.checkpoint_every=7", "data.data_dir=/z", "compare=null")
    assert of("optimizer.lr=1e-3", *asides, "+method.k=4", *more, "hydra/launcher=joblib") == base
    assert of("method.k=4", "optimizer.lr=0.002") != base and of("method.k=8", "optimizer.lr=0.001") != base
    assert of("method.k=[4, 4]").settings == of("method.k=[4,4]").settings
    assert of("method.k=1", "method.k=4", "optimizer.lr=0.001") == base, "the last one counts"
    assert of("scheduler=linear") != of("scheduler=constant") != of()
    assert of("data.train_fraction=0.1").task != of().task and of("method.k=2").task == of().task
    assert of("protocol=transfer", choices={"protocol": "transfer"}) == of(choices={"protocol": "fit"})
    assert of(choices={"protocol": "dqn"}) != of(choices={"protocol": "evolution"})
    old = {"method": "gcr", "metrics": {}, "choices": {}}
    assert grouping.group_of(old) == of()


def test_words_for_what_differs() -> None:
    def told(*typed: list[str]) -> list[str]:
        return grouping.differences([grouping.Group((), grouping.settings_of(words)) for words in typed])

    assert told(["method.k=1", "data.batch_size=8"], ["method.k=2", "data.batch_size=8"]) == ["k=1", "k=2"]
    assert told(["method.k=1", "optimizer.lr=1e-2"], ["method.k=1"]) == ["lr=0.01", ""]
    assert told(["a.seed=1", "b.seed=2"], []) == ["a.seed=1, b.seed=2", ""]
    assert told(["method.k=1"]) == [""] and told(["~callbacks.x"], []) == ["x", ""]


FIGURES = {"test__accuracy": 0.9, "probe__accuracy": 0.8, "features__intra_class_angle": 30.0}


def runs(root: Path) -> list[dict[str, Any]]:
    found = []
    for seed in range(2):
        for k in (1, 4, 16):
            metrics = {name: value + 0.01 * seed + 0.001 * k for name, value in FIGURES.items()}
            found.append(write(root / f"{k}_{seed}", seed, f"method.k={k}", subspace__k=k, **metrics))
        found.append(write(root / f"softmax_{seed}", seed, method="softmax", **FIGURES))
    return found


def test_plot_over_k(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    runs(tmp_path / "a")
    other = tmp_path / "b"
    write(other / "x", 0, "method.k=4", subspace__k=4, test__accuracy=0.5)  # without figures of features: not in it
    assert report.main([tmp_path / "a", other]) == 0
    printed = capsys.readouterr()
    target = tmp_path / "a" / "transfer_vs_k.png"
    assert f"drawn over k: {target}" in printed.err and target.read_bytes()[:4] == b"\x89PNG"
    assert "k=16" in printed.out and "0.921 ± 0.007" in printed.out
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes] == [label for _, label in transfer_plot._PANELS]
    for axes, (metric, _) in zip(figure.axes, transfer_plot._PANELS, strict=True):
        assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [1, 4, 16]
        (curve,) = (container[0] for container in axes.containers)
        base = FIGURES[metric.replace("/", "__")]
        assert list(curve.get_xdata()) == [1, 4, 16]
        assert list(curve.get_ydata()) == pytest.approx([base + 0.005 + 0.001 * k for k in (1, 4, 16)])
        flat = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(y) for y in flat] == [[base, base]], "softmax is a band"
    names = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert sorted(names) == ["gcr", "softmax"]


def test_other_settings_make_further_curves(tmp_path: Path) -> None:
    found = runs(tmp_path)
    second = [json.loads(json.dumps(results)) for results in found if results["method"] == "gcr"]
    for results in second:
        results["choices"]["optimizer"] = "adamw"
    for results in second[:3]:
        results["overrides"].append("method.gamma=16")
    curves = transfer_plot._curves([*found, *second])
    sizes = {name: [len(curve[k]) for k in sorted(curve)] for name, curve in curves.items()}
    assert sizes == {
        "gcr optimizer=sgd": [2, 2, 2],
        "softmax optimizer=sgd": [2],
        "gcr gamma=16, optimizer=adamw": [1, 1, 1],
        "gcr optimizer=adamw": [1, 1, 1],
    }


def test_one_file_per_task_and_none_without_subspaces(tmp_path: Path) -> None:
    found = runs(tmp_path / "a")
    second = [json.loads(json.dumps(results)) for results in found]
    for results in second:
        results["overrides"].append("data.train_fraction=0.1")
    names = [path.name for path in transfer_plot.draw_all([*found, *second], tmp_path / "plots")]
    assert names == ["transfer_vs_k_mlp_digits.png", "transfer_vs_k_mlp_digits_2.png"]
    assert all((tmp_path / "plots" / name).is_file() for name in names)
    assert transfer_plot.draw_all([r for r in found if r["method"] == "softmax"], tmp_path / "none") == []
    failed = [results | {"status": "failed"} for results in found]
    assert transfer_plot.draw_all(failed, tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_several_probes_have_a_row_each() -> None:
    one = {"probe/mnist/accuracy": 0.5, "probe/accuracy": 0.5, "features/sparsity": 0.25}
    two = one | {"probe/usps/accuracy": 0.7, "probe/accuracy": 0.6}
    rows = list(tables.comparison([("a", one)]).columns[0].cells)
    assert rows == ["probe accuracy", "feature sparsity"]
    table = tables.comparison([("a", one), ("b", two)])
    assert list(table.columns[0].cells) == ["probe accuracy", "probe mnist", "probe usps", "feature sparsity"]
    assert list(table.columns[1].cells) == ["0.500", "0.500", "—", "25.0 %"]


def test_narrow_terminals_get_several_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    runs(tmp_path)
    plain = rich.console.Console

    def terminal(**settings: Any) -> Any:
        return plain(**settings) if settings else plain(width=60, force_terminal=True, no_color=True, file=file)

    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr("rich.console.Console", terminal)
        assert report.main([tmp_path]) == 0
    lines = (tmp_path / "out").read_text().splitlines()
    heads = [line for line in lines if "settings" in line]
    assert len(heads) == 3 and all("method" in line and "seeds" in line for line in heads)
    labels = ("test accuracy", "probe accuracy", "intra-class angle, °")
    assert [label for line in heads for label in labels if label in line] == list(labels), "none is cut or wrapped"


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from subspace_lab.cli import main

    runs(tmp_path)
    assert main(["report", str(tmp_path), "--markdown"]) == 0
    first, blank, *lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    assert [line.count("|") for line in lines[end + 3 : -1]] == [7] * 5, "differences from softmax"
    assert lines[-1].startswith("best test/accuracy: method=gcr method.k=16, ")
    lines = lines[:end]
    assert first == "optimizer sgd, model mlp, data digits, steps 60, status completed" and not blank
    assert all(line.startswith("|") and line.endswith("|") for line in lines) and len(lines) == 2 + 4
    assert set(lines[1]) <= set("|-: ") and len({line.count("|") for line in lines}) == 1
    assert main(["report", "--markdown"]) == 2 and "needs the folders" in capsys.readouterr().err
