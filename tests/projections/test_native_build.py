"""Building the C kernels: the cache, several processes at once, and every way in which it can fail quietly."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from subspace_lab.projections import native
from subspace_lab.projections.native import build, check, cpu

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path, caplog):
    """No library loaded, an empty cache folder, and the log read."""
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path))
    monkeypatch.delenv("SUBSPACE_NATIVE", raising=False)
    # Optimisation is tested elsewhere; here it is compiled often.
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))
    caplog.set_level(logging.INFO)
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


def works():
    x = torch.tensor([[1.0, 2.0]])
    done = native.fwht_(x, 2)
    assert x.tolist() == ([[3.0, -1.0]] if done else [[1.0, 2.0]])
    return done


def libraries(tmp_path):
    return sorted((tmp_path / "native").glob("*.so"))


@needs_compiler
def test_built_once_then_taken_from_the_cache(tmp_path, monkeypatch, caplog):
    assert works()
    (made,) = libraries(tmp_path)
    assert [p.name for p in made.parent.iterdir()] == [made.name], "nothing is left behind"
    cpu._library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert works()
    assert not caplog.records


@needs_compiler
def test_a_damaged_library_is_built_again():
    path = build.cache_folder() / f"{build._identity(build.compiler())}.so"
    build._compile(build.compiler(), path)  # not loaded: a file that is mapped must not be changed
    content = path.read_bytes()
    other_byte = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    for damaged in (b"", b"not a library" * 100, other_byte, content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert not build._sound(path)
    assert works()
    assert build._sound(path)


@needs_compiler
def test_another_processor_or_source_has_another_name(monkeypatch):
    command = build.compiler()
    first = build._identity(command)
    assert build._identity(command) == first
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build._identity(command) != first


def test_no_compiler(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not works()
    assert not works()
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["no C compiler"], "one line, once"


@pytest.mark.parametrize("CC", ["/bin/false", "no-such-compiler", "sh -c 'exit 3'", "true"])
def test_broken_compiler(monkeypatch, caplog, CC):
    monkeypatch.setenv("CC", CC)
    assert not works()
    assert len(caplog.records) == 1
    assert "torch alone" in caplog.text


def test_cache_that_cannot_be_written(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBSPACE_CACHE", str(tmp_path / "file"))
    assert not works()
    assert len(caplog.records) <= 1


@needs_compiler
def test_flags_the_compiler_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(build, "CHOICES", (("-march=no-such-machine",), ("-fno-such-thing",), ()))
    assert works()


@needs_compiler
def test_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPACE_NATIVE", "0")
    assert not works()
    assert not libraries(tmp_path)
    monkeypatch.setenv("SUBSPACE_NATIVE", "1")
    assert works()


@needs_compiler
@pytest.mark.parametrize("wrong", ["lift", "project"])
def test_a_library_that_is_wrong_is_not_used(monkeypatch, caplog, wrong):
    right = getattr(check, wrong)

    def off_by_one_bit(*arguments):
        result = right(*arguments)
        result.view(torch.int32)[-1] ^= 1
        return result

    monkeypatch.setattr(check, wrong, off_by_one_bit)
    assert not works()
    assert [r.levelname for r in caplog.records] == ["WARNING"]


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    # The build alone, without torch: that they meet is then likely.
    program = (
        "import importlib.util, sys, types, time\n"
        "for name in ('subspace_lab', 'subspace_lab.projections', 'subspace_lab.projections.native'):\n"
        "    package = types.ModuleType(name)\n"
        "    package.__path__ = [sys.argv[1]]\n"
        "    package.__spec__ = importlib.util.spec_from_loader(name, None, is_package=True)\n"
        "    package.__spec__.submodule_search_locations = [sys.argv[1]]\n"
        "    sys.modules[name] = package\n"
        "from subspace_lab.projections.native import build\n"
        "build.FLAGS = tuple('-O0' if f == '-O3' else f for f in build.FLAGS)\n"
        "build._source = lambda name: open(sys.argv[1] + '/' + name, 'rb').read()\n"
        "sys.stdin.read(1)\n"
        "assert build.library() is not None\n"
    )
    folder = str(Path(build.__file__).parent)
    running = [
        subprocess.Popen([sys.executable, "-c", program, folder], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in running:
        process.stdin.write(b"g")
        process.stdin.flush()
    for process in running:
        assert process.wait(timeout=120) == 0, process.stderr.read().decode()
    (made,) = libraries(tmp_path)
    assert build._sound(made)
    assert [p.name for p in made.parent.iterdir()] == [made.name]
