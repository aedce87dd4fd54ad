"""The table of docs/scale.md, from the closed form; `--check` holds the estimate on shapes (minutes) against it.

python scripts/scale_table.py            # writes it
python scripts/scale_table.py --check    # estimate=true of every row of 8 processes beside the formula
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

MODELS = ("llama_1b", "llama_3b", "llama_7b", "llama_13b", "llama_70b")
PROCESSES = (8, 64)
VOCABULARY = 32000
WIDTH = 2  # trainer.precision=bf16-true
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
START, END = "<!-- scale -->", "<!-- /scale -->"


def rows(processes: int) -> list[tuple[str, str, str, Any]]:
    """(model, method, strategy, costs) of every row."""
    from omegaconf import OmegaConf

    from subspace_lab.analysis.cost_model import costs, llama_weights

    found = []
    for name in MODELS:
        model = OmegaConf.load(DOCUMENT.parents[1] / "conf" / "model" / f"{name}.yaml")
        weights = llama_weights(
            model.hidden_size,
            model.intermediate_size,
            model.num_layers,
            model.num_heads,
            model.get("num_kv_heads"),
            VOCABULARY,
        )
        for method, rank in (("none", None), ("galore", int(model.recipe.rank))):
            for strategy in ("ddp", "fsdp"):
                made = costs(weights, processes=processes, strategy=strategy, width=WIDTH, rank=rank)  # type: ignore[arg-type]
                found.append((name, method if rank is None else f"{method}, r = {rank}", strategy, made))
    return found


def table() -> str:
    """The table in Markdown."""
    head = "| model | method | strategy | "
    head += " | ".join(
        f"{what}, {n} GPUs" for n in PROCESSES for what in ("GB held", "GB sent per step", "per refresh")
    )
    lines = [head + " |", "|---|---|---|" + "---:|" * 3 * len(PROCESSES)]
    for few, many in zip(*(rows(n) for n in PROCESSES), strict=True):
        cells = [f"{x / 1e9:.2f}" for _, _, _, c in (few, many) for x in (c.total, c.sent, c.sent_refresh)]
        cells = [cell if cell != "0.00" else "–" for cell in cells]
        lines.append(f"| `{few[0]}` | {few[1]} | {few[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check() -> int:
    """Print, row by row, the estimate beside the formula; returns 1 if they differ by more than one per cent."""
    from subspace_lab.app import compose_config
    from subspace_lab.protocols.estimate import estimate

    worst = 0.0
    for model, method, strategy, formula in rows(PROCESSES[0]):
        words = ["paths.output_dir=.", f"model={model}", f"method={method.split(',')[0]}", f"trainer={strategy}"]
        words += [f"trainer.devices={PROCESSES[0]}", "trainer.precision=bf16-true", "data.batch_size=1"]
        words += [f"model.vocab_size={VOCABULARY}", "data.global_batch_size=null", "data.block_size=16"]
        found = estimate(compose_config(words), [])
        ours = found.total - found.activations
        pairs = [(ours, formula.total), (found.sent, formula.sent), (found.sent_refresh, formula.sent_refresh)]
        off = max(abs(a / b - 1) for a, b in pairs if b)
        worst = max(worst, off)
        print(f"{model:10} {method:18} {strategy:5}", *(f"{a / 1e9:9.3f} {b / 1e9:9.3f}" for a, b in pairs), flush=True)
    print(f"largest difference: {100 * worst:.2f} %")
    return 0 if worst < 0.01 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return check()
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(START, 1)
    DOCUMENT.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
