"""Help, version, list, completion: quick, from the standard library alone."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "lightning", "pytorch_lightning", "transformers", "wandb", "datasets", "torchvision", "sklearn")


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def test_help_and_list_are_faster_than_importing_hydra() -> None:
    commands = {
        "hydra": ("-c", "import hydra"),
        "help": ("-m", "subspace_lab", "--help"),
        "list": ("-m", "subspace_lab", "list"),
    }
    # Taken in turns, so that a busy moment of the machine hits all three.
    rounds = [{name: seconds(*words) for name, words in commands.items()} for _ in range(4)]
    best = {name: min(times[name] for times in rounds) for name in commands}
    assert best["help"] <= 0.6 * best["hydra"]
    assert best["list"] <= 0.6 * best["hydra"]


def test_printing_a_configuration_imports_nothing_heavy() -> None:
    program = (
        "import sys; from subspace_lab.cli import main; code = main(['--cfg', 'job']); "
        f"sys.exit(code or ','.join(name for name in {HEAVY} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "method:" in done.stdout


def test_help_says_how_to_run_and_resume(command) -> None:
    answer = command("method=galore", "--help")
    assert answer.code == 0
    for words in ("method=galore data=c4 model=llama_1b", "resume RUN_DIR", "completion bash", "--debug"):
        assert words in answer.out


def test_version(command) -> None:
    from subspace_lab import __version__

    assert command("--version").out == f"subspace-lab {__version__}\n"


def test_list_shows_descriptions_and_papers(command) -> None:
    answer = command("list", "methods")
    assert answer.code == 0
    assert "galore" in answer.out and "Zhao et al." in answer.out and "none" in answer.out
    everything = command("list").out
    assert all(f"{group}=" in everything for group in ("method", "optimizer", "model", "data", "trainer"))


def test_list_orders_models_by_size() -> None:
    from subspace_lab.catalog import options

    models = options("model")
    assert models.index("llama_9m") < models.index("llama_130m") < models.index("llama_1b") < models.index("llama_7b")


def test_every_option_says_what_it_is() -> None:
    from subspace_lab import catalog

    silent = [
        f"{group}/{entry.name}"
        for group in catalog.groups()
        for entry in catalog.entries(group)
        if not entry.description
    ]
    assert not silent, f"no comment at the top of {silent}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["met"], {"method=", "method."}),
        (["method=ga"], {"method=galore"}),
        (["method=none,ga"], {"method=none,galore"}),
        (["-m", "model=llama_1"], {"model=llama_130m", "model=llama_13b", "model=llama_1b"}),
        (["method=galore", "method.refresh_e"], {"method.refresh_every="}),
        (["resume=a"], {"resume=auto"}),
        (["res"], {"resume", "resume="}),
        (["list", "meth"], {"method", "methods"}),
        (["completion", "z"], {"zsh"}),
        (["--ver"], {"--version"}),
        (["seed=1", "doc"], set()),
    ],
)
def test_completion(words: list[str], expected: set[str]) -> None:
    from subspace_lab.completion import candidates

    assert set(candidates(words)) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_the_hidden_command(command, shell: str) -> None:
    answer = command("completion", shell)
    assert answer.code == 0
    assert "__complete" in answer.out


def test_bash_completes_after_the_equals_sign() -> None:
    from subspace_lab.completion import script

    # The functions bash calls, without readline: COMP_LINE as typed, COMPREPLY as it replaces the word after "=".
    program = (
        'complete() { :; }; compopt() { :; }; subspace-lab() { "$PY" -m subspace_lab "$@"; };'
        f"{script(['bash'])}"
        'COMP_LINE="subspace-lab method=galore trainer=c" COMP_POINT=36; _subspace_lab; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env={"PY": sys.executable}, timeout=60
    )
    assert done.stdout.split() == ["cpu"], done.stderr


def test_report_and_resume_want_folders(command) -> None:
    for word in ("report", "resume"):
        answer = command(word)
        assert answer.code == 2
        assert "outputs" in answer.err and answer.err.count("\n") == 1
