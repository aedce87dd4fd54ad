"""`subspace-lab compress`: a finished run in a few hundred bytes, with a bound on its error on new examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspace_lab.compression import quantize, sid
from subspace_lab.compression.certificate import certify
from subspace_lab.compression.evaluate import Score, evaluate
from subspace_lab.compression.finetune import finetune
from subspace_lab.compression.quantize import Array, Quantized
from subspace_lab.compression.rebuild import initial, place, restore
from subspace_lab.compression.solution import Solution, buffers_of, sha256
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.data.supervised import SupervisedDataModule
    from subspace_lab.subspaces.flat import FlatModel

FILE = "compression.json"
LEVELS = (5, 7, 9, 11, 13, 17, 21, 32, 64)
#: a codebook's own bytes grow with it: beyond these many values the grids are far ahead
_MAX_CODEBOOK = 16
#: of z, in steps of the grid; the bound of the reference table is flat around it
_FINETUNE_LR = 0.1
#: grids finer than this lose nothing that training could win back
_MAX_FINETUNED = 16


@dataclass(frozen=True)
class Row:
    """One coding of a solution and what became of it.

    Attributes:
        coding: float32, float16, full (equally spaced over the range of z), clipped, codebook, or finetuned.
        levels: number of values; 0 for floats.
        payload_bytes: what describes the numbers, given architecture, seeds and decoder.
        file_bytes: the .sid file; 0 for floats.
        test_accuracy: of the rebuilt model.
        train_error: of the rebuilt model on all training examples.
        bound: on the error on new examples; 1 for floats, which are not certified.
    """

    coding: str
    levels: int
    payload_bytes: int
    file_bytes: int
    test_accuracy: float
    train_error: float
    bound: float


@dataclass
class Bench:
    """A run's model and data, to try codings on.

    Attributes:
        solution: the trained one, without the buffers that are as the model is built.
        model: the reparametrised model, on its device.
        data: the run's data, set up.
    """

    solution: Solution
    model: FlatModel
    data: SupervisedDataModule

    @property
    def z(self) -> Array:
        """The trained coordinates, float64 (d,)."""
        return self.solution.z.double().numpy()

    def score(self, solution: Solution) -> tuple[Score, Score]:
        """Return the scores on all training examples and on the test examples at a solution."""
        place(self.model, solution)
        self.model.settle()
        return evaluate(self.model, self.data.train_eval_dataloader()), evaluate(
            self.model, self.data.test_dataloader()
        )

    def measure(
        self, coding: str, quantized: Quantized, solution: Solution, choices: int, delta: float
    ) -> tuple[Row, sid.Compressed]:
        """Score one coding: the rounded model itself, at the θ that `rebuild` gives."""
        train, test = self.score(sid.quantized_solution(solution, quantized))
        file = sid.compress(solution, quantized, sha256(self.model.theta_exact()))
        bound = certify(train.errors, train.examples, file.payload_bytes, choices=choices, delta=delta).bound
        error = train.errors / train.examples
        count = quantized.levels.count
        return Row(coding, count, file.payload_bytes, len(file.data), test.accuracy, error, bound), file

    def finetuned(self, levels: quantize.Levels, epochs: int) -> tuple[Quantized, Solution]:
        """Train on for a grid, from the trained solution; return what came out on it."""
        place(self.model, self.solution)
        steps = epochs * -(-self.data.train_rows // self.data.batch_size)
        self.data.configure(0, 1, self.solution.seed)
        finetune(
            self.model,
            levels,
            self.data.task(),
            self.data.train_dataloader(),
            steps=steps,
            lr=_FINETUNE_LR,
            rate=1 / self.data.train_rows,
        )
        buffers = {name: value for name, value in buffers_of(self.model).items() if name in self.solution.buffers}
        z = self.model.z.detach().cpu()
        solution = replace(self.solution, z=z, buffers={name: value.cpu().clone() for name, value in buffers.items()})
        return quantize.on_grid(z.double().numpy(), levels), solution


def open_run(run_dir: Path, device: torch.device | str = "cpu") -> Bench:
    """Load a finished run: its solution and its data.

    Raises:
        UserError: not a run of this kind, no data, θ cannot be reproduced.
    """
    from omegaconf import OmegaConf

    from subspace_lab import build, rundir
    from subspace_lab.compression import solution as files

    config = run_dir / "config.yaml"
    if not config.is_file() or not (run_dir / files.FILE).is_file():
        near = sorted(run_dir.glob(f"**/{files.FILE}")) if run_dir.is_dir() else []
        hint = (
            f"did you mean {near[-1].parent}?"
            if near
            else "subspace-lab method=intrinsic_dimension protocol=fit method.d=…"
        )
        raise UserError(f"{run_dir} is no finished run in a subspace (no {files.FILE})", hint=hint)
    if rundir.status(run_dir) not in (None, "completed"):
        raise UserError(f"{run_dir} is not finished", hint=f"subspace-lab resume {run_dir}")
    solution = Solution.load(run_dir / files.FILE)
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, type(OmegaConf.create({})))
    data: Any = build.build_data(cfg)
    if not hasattr(data, "train_eval_dataloader"):
        raise UserError(f"{run_dir}: the bound is on a classifier's error, and this run's data has no labels")
    model, _ = initial(solution)
    as_built = {name: value.clone() for name, value in buffers_of(model).items()}
    changed = {n: v for n, v in solution.buffers.items() if n not in as_built or not torch.equal(v, as_built[n])}
    restore(solution)  # says so if θ is not what was trained
    data.configure(0, 1, int(cfg.seed))
    data.prepare_data()
    data.setup("fit")
    return Bench(replace(solution, buffers=changed), model.to(device), data)


def candidates(z: Array, levels: Sequence[int]) -> Iterator[tuple[str, Quantized]]:
    """Yield codings of z by name: grids over the whole range, clipped ones where they differ, codebooks."""
    for count in levels:
        whole, narrow = quantize.full_range(z, count), quantize.clipped(z, count)
        yield "full", whole
        if narrow.levels != whole.levels:
            yield "clipped", narrow
        if count <= _MAX_CODEBOOK:
            yield "codebook", quantize.kmeans(z, count)


def compress(
    bench: Bench,
    levels: Sequence[int] = LEVELS,
    *,
    delta: float = 0.05,
    epochs: int = 0,
    choices: int = 1,
    tell: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], sid.Compressed]:
    """Try codings and return all rows and the file with the smallest bound.

    Args:
        bench: the run.
        levels: numbers of levels to try.
        delta: probability that the bound does not hold.
        epochs: of quantisation-aware training for each grid of at most 16 levels; 0 for none.
        choices: among how many (seeds, architectures, …) the run itself was chosen; the codings tried are counted here.
        tell: called with each row.
    """
    z = bench.z
    plain = list(candidates(z, levels))
    coarse = [count for count in levels if count <= _MAX_FINETUNED] if epochs else []
    choices *= len(plain) + len(coarse)
    rows = []
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        rounded = replace(bench.solution, z=bench.solution.z.to(dtype).to(bench.solution.z.dtype))
        train, test = bench.score(rounded)
        size = bench.solution.z.numel() * dtype.itemsize
        rows.append(Row(name, 0, size, 0, test.accuracy, train.errors / train.examples, 1.0))
        tell(rows[-1])
    best: tuple[Row, sid.Compressed] | None = None

    def keep(coding: str, quantized: Quantized, solution: Solution) -> None:
        nonlocal best
        row, file = bench.measure(coding, quantized, solution, choices, delta)
        rows.append(row)
        tell(row)
        if best is None or row.bound < best[0].bound:
            best = row, file

    for name, quantized in plain:
        keep(name, quantized, bench.solution)
    for count in coarse:
        keep("finetuned", *bench.finetuned(quantize.clipped(z, count).levels, epochs))
    assert best is not None
    return rows, best[1]


def verify(path: Path, bench: Bench) -> Score:
    """Rebuild from a file alone and return the score on the test examples.

    Raises:
        UserError: the file does not give the weights that it says.
    """
    model, _ = restore(sid.load(path).solution, bench.model.z.device)
    return evaluate(model, bench.data.test_dataloader())


def write_rows(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """Write compression.json: all rows and what they were computed with."""
    from subspace_lab.reporting.results import write_text

    write_text(path, json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
