"""The one function to read first: what happens between a validated configuration and the last line printed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from subspace_lab import build, catalog, schema
from subspace_lab.errors import Interrupted
from subspace_lab.reporting import results
from subspace_lab.reporting.record import RunRecord, baseline_overrides, status_of
from subspace_lab.training import environment

if TYPE_CHECKING:
    from omegaconf import DictConfig

# `compare=auto` trains the baseline too in exactly this case: somebody is trying the program out.
DEMO = {
    "method": "galore",
    "model": "llama_tiny",
    "data": "stdlib_text",
    "protocol": "fit",
    "experiment": None,
}


def run(cfg: DictConfig) -> float | None:
    """Run one experiment and return the figure a sweep minimises (None on other ranks and for `estimate=true`).

    Seeds, builds the parts, hands them to the protocol and writes the run folder; then, with `compare`, does the same
    for the baseline in a folder inside. A run that was cut off goes on where it was, finished parts are not repeated.

    Args:
        cfg: the composed and validated configuration; `paths.output_dir` is the run folder.
    """
    schema.check_companions(cfg)
    if cfg.estimate:
        from subspace_lab.protocols.estimate import print_estimate

        baseline_name = compare_name(cfg) or "adamw"
        label = label_of({"method": cfg.method.name, "choices": choices()})
        baseline = baseline_config(cfg, baseline_name)
        # A method's file may choose model and data; what is left without it is no comparison.
        same = all(schema.to_plain(baseline[group]) == schema.to_plain(cfg[group]) for group in ("model", "data"))
        shown = [(baseline_name, baseline)] if same and label != baseline_name else []
        print_estimate([(label, cfg), *shown])
        return None
    run_dir = Path(cfg.paths.output_dir)
    main = environment.is_main_process()
    try:
        found = train(cfg, run_dir, task_overrides(), choices(), resume_dir=run_dir)
        runs = [(label_of(found), run_dir, found)]
        name = compare_name(cfg)
        if name is not None:
            runs.append((name, *_train_baseline(cfg, run_dir, name)))
    except Interrupted:
        if main:
            raise
        return None  # the first process tells; an exit code from another would make Lightning kill it
    if main:
        _finish(cfg, run_dir, found, runs)
    value = found["metrics"].get(found.get("objective", ""))
    return float(value) if value is not None else None


def train(
    cfg: DictConfig, run_dir: Path, overrides: list[str], chosen: dict[str, Any], *, resume_dir: Path
) -> results.Results:
    """Run the protocol of one configuration in one folder, and record how it ended.

    Args:
        cfg: the configuration.
        run_dir: its folder.
        overrides: what was typed to make it.
        chosen: the option of each group.
        resume_dir: the folder to continue with, if it is cut off.
    """
    from subspace_lab.reporting.environment import capture

    about = {
        "name": str(cfg.name),
        "method": chosen.get("method", cfg.method.get("name", "")),
        "seed": cfg.seed,
        "config_hash": schema.config_hash(cfg),
        "command": results.command_line(sys.argv),
        "overrides": overrides,
        "choices": chosen,
        "environment": capture(),
    }
    record = RunRecord(run_dir, about, writes=environment.is_main_process())
    finished = record.finished() if cfg.resume is not None else None
    if finished is not None:
        return finished
    record.start(schema.to_plain(cfg))
    try:
        outcome = build.instantiate(cfg.protocol).run(cfg, run_dir, label=label_of(about), resume_dir=resume_dir)
    except BaseException as error:
        record.write(status_of(error), message=str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    # Not `completed` before the baseline is: a run that is resumed must find it unfinished.
    return record.write("completed" if compare_name(cfg) is None else "interrupted", outcome)


def _train_baseline(cfg: DictConfig, run_dir: Path, name: str) -> tuple[Path, results.Results]:
    baseline = baseline_config(cfg, name)
    overrides = baseline_overrides(task_overrides(), name, catalog.options("optimizer"))
    folder = run_dir / f"compare_{name}"
    optimizer = name if name in catalog.options("optimizer") else None
    chosen = choices() | ({"method": "none", "optimizer": optimizer} if optimizer else {"method": name})
    return folder, train(baseline, folder, overrides, chosen, resume_dir=run_dir)


def baseline_config(cfg: DictConfig, name: str) -> DictConfig:
    """Return the configuration that `cfg` is compared with: an optimizer without a subspace, or a method."""
    from subspace_lab.app import compose_config

    baseline = compose_config(baseline_overrides(task_overrides(), name, catalog.options("optimizer")))
    with open_dict(baseline):
        baseline.resume = None if cfg.resume is None else "auto"
    return baseline


def _finish(
    cfg: DictConfig, run_dir: Path, found: results.Results, runs: list[tuple[str, Path, results.Results]]
) -> None:
    """Complete results.json, draw the curves, print the table and, as the last line, the run folder."""
    from rich.console import Console

    from subspace_lab.reporting import accuracy_matrix, plots, published, tables

    RunRecord(run_dir, {}, writes=True).rewrite(
        found | {"compared_with": [str(f.name) for _, f, _ in runs[1:]]}, "completed"
    )
    if "search" in found:
        _show_search(cfg, run_dir, found["search"])
        print(run_dir)
        return
    if "merged_files" in found:
        print(found["merged_files"]["output"])
        return
    if "merge" in found:
        _show_merge(cfg, run_dir, found)
        print(run_dir)
        return
    console = Console()
    if "continual" in found:
        section, target = found["continual"], run_dir / "plots" / accuracy_matrix.FILE
        accuracy_matrix.draw(section, target, f"{cfg.name}, seed {cfg.seed}")
        console.print(f"\n{accuracy_matrix.headline(section)}", accuracy_matrix.table(section), sep="\n")
    counted = "rounds" if "federated" in found else "steps"
    title = f"{cfg.name}, seed {cfg.seed}, {found['timing'].get('steps', 0)} {counted}"
    plots.draw_loss([(label, folder) for label, folder, _ in runs], run_dir / "plots" / "loss.png", title)
    console.print(f"\n{title}")
    console.print(tables.comparison([(label, r["metrics"]) for label, _, r in runs]))
    lost = sorted(name for name, value in found["metrics"].items() if value is None or not math.isfinite(value))
    if lost:
        console.print(f"note: not finite: {', '.join(lost)}; the run diverged, try a smaller optimizer.lr")
    entry = cfg.get("published")
    if entry:
        console.print(tables.beside_published(found["metrics"], published.lookup(entry)))
    print(run_dir)


def _show_search(cfg: DictConfig, run_dir: Path, search: dict[str, Any]) -> None:
    """Draw the curve of a dimension search and print its points and its dimensions, beside published ones."""
    from rich.console import Console

    from subspace_lab.reporting import dimension_plot, dimension_tables, published

    seeds = search["seeds"]
    title = f"{cfg.name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''} from {seeds[0]}"
    dimension_plot.draw(search, run_dir / "plots" / "accuracy_vs_d.png", title)
    console = Console()
    console.print(f"\n{title}, D = {search['D']:,} weights")
    console.print(dimension_tables.points(search))
    entry = cfg.get("published")
    console.print(dimension_tables.definitions(search, published.lookup(entry) if entry else None))
    for note in dimension_tables.notes(search):
        console.print(f"note: {note}", highlight=False)


def _show_merge(cfg: DictConfig, run_dir: Path, found: results.Results) -> None:
    """Draw and print the accuracies of base, merged model and experts, beside published ones of the same family."""
    from rich.console import Console

    from subspace_lab.reporting import merge_report, tables

    section, console = found["merge"], Console()
    merge_report.draw(section, run_dir / "plots" / merge_report.FILE, f"{cfg.name}, seed {cfg.seed}")
    console.print(f"\n{merge_report.headline(section, found['metrics'])}", highlight=False)
    console.print(merge_report.table(section))
    if "connectivity" in section:
        from subspace_lab.merging import connectivity

        curves = {label: connectivity.Connectivity.read(line) for label, line in section["connectivity"].items()}
        connectivity.draw_connectivity(curves, run_dir / "plots" / "connectivity.png", f"{cfg.name}, seed {cfg.seed}")
        console.print(connectivity.connectivity_table(curves))
    for note in merge_report.notes(section):
        console.print(f"note: {note}", highlight=False)
    entry = cfg.get("published")
    if entry:
        theirs = merge_report.published_entry(entry)
        refusal = merge_report.family_refusal(section, theirs)
        console.print(f"note: {refusal}" if refusal else tables.beside_published(found["metrics"], theirs))


def compare_name(cfg: DictConfig) -> str | None:
    """Return what this run is compared with, None for nothing."""
    if cfg.compare != "auto":
        return str(cfg.compare) if cfg.compare is not None else None
    chosen = choices()
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    demo = bool(chosen) and not in_sweep and all(chosen.get(group) == option for group, option in DEMO.items())
    return "adamw" if demo else None


def label_of(about: results.Results) -> str:
    """Return what tables and progress lines call a run: its method, or its optimizer if it has none."""
    method = str(about["method"])
    return str(about["choices"].get("optimizer", method)) if method == "none" else method


def choices() -> dict[str, Any]:
    """Return the option chosen of each group, empty outside a Hydra job."""
    if not HydraConfig.initialized():
        return {}
    chosen = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    assert isinstance(chosen, dict)
    return {str(group): option for group, option in chosen.items() if not str(group).startswith("hydra")}


def task_overrides() -> list[str]:
    """Return the overrides that were typed, empty outside a Hydra job."""
    return [str(text) for text in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
