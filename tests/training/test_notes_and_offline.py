"""What the console shows of our own warnings, and folders without a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from subspace_lab.errors import UserError
from subspace_lab.protocols.fit import find_checkpoint
from subspace_lab.training import environment


def test_our_own_warnings_are_plain_notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda *args: print("as python shows it"))
    environment.quiet_lightning()
    warnings.showwarning("rank 9 is more than 4", UserWarning, environment.__file__, 1)
    warnings.showwarning("of somebody else", UserWarning, "/elsewhere/x.py", 1)
    captured = capsys.readouterr()
    assert captured.err == "note: rank 9 is more than 4\n"
    assert captured.out == "as python shows it\n"


def test_a_named_folder_without_a_readable_checkpoint_is_refused(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other" / "1"
    (other / "checkpoints").mkdir(parents=True)
    run.mkdir()
    assert find_checkpoint("auto", run) is None
    assert find_checkpoint(str(run), run) is None  # `resume RUN_DIR` of a run killed before its first checkpoint
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(str(other), run)
    (other / "checkpoints" / "step_00000005.ckpt").write_bytes(b"cut short")
    with pytest.raises(UserError, match="no checkpoint in") as caught:
        find_checkpoint(str(other.parent), run)
    assert str(other) in str(caught.value.hint)
    with pytest.raises(UserError, match="all 1 are damaged"):
        find_checkpoint(str(other), other)
