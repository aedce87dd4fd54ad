"""What is shipped: every folder of code, every configuration file, nothing of this machine."""

from __future__ import annotations

import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest

from subspace_lab import doctor

ROOT = Path(__file__).parents[2]


def test_every_folder_of_code_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "subspace_lab").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(listed) == found | {"subspace_lab.conf"}
    assert listed == sorted(listed)


def test_requirements_are_ranges_and_torch_is_the_registrys() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    assert not [line for line in everything if "==" in line or "@" in line]
    assert "torch>=2.11" in project["dependencies"]
    assert not any("whl/cpu" in (ROOT / name).read_text() for name in ("pyproject.toml", "Makefile", ".ci/run"))


def test_make_help_lists_the_targets() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for target in ("run", "test", "test-slow", "lint", "format", "bench", "bench-gpu", "clean"):
        assert f"make {target} " in done.stdout


def test_shell_scripts_parse() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True, timeout=60)


def test_doctor_tells_a_broken_torchvision_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (check,) = doctor.torchvision()
    assert check.verdict == "fail" and "nms" in check.finding and "torch torchvision" in check.mend
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    (check,) = doctor.torchvision()
    assert check.verdict == "warn"


def test_doctor_ends_with_failure_only_for_what_every_run_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Check("hub", "warn", "far away", "go there")]),))
    assert doctor.main() == 0
    assert "→ go there" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Check("torch", "fail", "gone")]),))
    assert doctor.main() == 1


def test_doctor_finds_the_wandb_key_without_showing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    (check,) = doctor.wandb()
    assert check.verdict == "warn" and "wandb login" in check.mend
    file.write_text("machine api.wandb.ai login user password not-to-be-shown\n")
    (check,) = doctor.wandb()
    assert check.verdict == "ok" and "not-to-be-shown" not in check.finding


def test_doctor_knows_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SUBSPACE_DATA", str(tmp_path / "none"))
    checks = {check.name: check for check in doctor.data()}
    assert checks["data"].verdict == "warn" and "SUBSPACE_DATA" in checks["data"].mend
    (tmp_path / "none" / "c4").mkdir(parents=True)
    checks = {check.name: check for check in doctor.data()}
    assert checks["data"].verdict == "ok" and "c4" in checks["data"].finding
