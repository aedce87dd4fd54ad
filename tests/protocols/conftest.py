"""The command line in this process, on a tiny text: no second import of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = [
    "data=text",
    "data.block_size=16",
    "data.batch_size=4",
    "data.val_fraction=0.2",
    "data.val_tokens=512",
    "data.global_batch_size=4",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_heads=2",
    "model.num_layers=1",
    "method.rank=4",
    "trainer=cpu",
    "trainer.max_steps=8",
    "trainer.val_every=4",
    "trainer.checkpoint_every=4",
    "trainer.log_every=1",
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """command(*words): what `subspace-lab` with a tiny task and these words returns."""
    lines = [
        f'{{"text": "document {i}: {"abcdefgh"[i % 8] * (i % 13)} the quick brown fox {i * i}"}}' for i in range(300)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> int:
        from subspace_lab.cli import main

        task = [f"data.files=[{tmp_path}/corpus.jsonl]", f"hydra.run.dir={tmp_path}/run"]
        argv = list(words) if words and words[0] == "resume" else [*TINY, *task, *words]
        monkeypatch.setattr("sys.argv", ["subspace-lab", *argv])
        return main(argv)

    return run
