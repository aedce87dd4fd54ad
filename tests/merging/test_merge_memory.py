"""A merge of files never holds more than (models + 2) × the largest tensor, mapped pages included: real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from subspace_lab.merging.averaging import SimpleAverage, TaskArithmetic
from subspace_lab.merging.base import Merge
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.files import merge_files
from subspace_lab.merging.settings import MergeSettings
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES

class Stacked(Merge):
    # Whole tensors, updates kept until the factor is known.
    has_factor = True
    def update(self, stack):
        return stack.total()

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

def merge(method, folder, models):
    paths = [str(folder / f"{t}.safetensors") for t in range(1, models + 1)]
    settings = MergeSettings(paths, str(folder / "0.safetensors"), device="cpu")
    merge_files(method, settings, folder / "out", lambda _: None)

found = {}
for name in ("small", "large"):  # the small ones load the code
    for method, models in ((TaskArithmetic(), 4), (SimpleAverage(), 4), (TIES(), 4), (TIES(trim="tensor"), 4),
                           (DARE(rescale="l1"), 4), (SLERP(), 2), (Stacked(), 4)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kilobytes("VmRSS")
        merge(method, Path(sys.argv[1]) / name, models)
        key = type(method).__name__ + getattr(method, "trim", "")
        found[key] = [kilobytes("VmHWM") - before, models]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peak_memory_is_a_few_tensors_not_a_model(tmp_path: Path) -> None:
    rows, columns, tensors = 2048, 1024, 12
    largest = rows * columns * 4
    g = torch.Generator().manual_seed(0)
    for name, size in (("small", 16), ("large", rows)):
        (tmp_path / name).mkdir()
        for model in range(5):
            state = {f"{i}.weight": torch.randn(size, columns, generator=g) for i in range(tensors)}
            save_file(state, tmp_path / name / f"{model}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], check=True, capture_output=True, text=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7
    for name, (peak, models) in found.items():
        allowed = (models + 2) * largest + 12 * 2**20  # buffers of hashing, pieces, what the allocator keeps
        assert allowed < tensors * largest  # less than one model
        assert peak * 1024 <= allowed, (name, peak / 1024, allowed / 2**20)
