"""Every mistake gets one line with the nearest thing that exists, exit code 2, no traceback and no run folder."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from subspace_lab import cli
from subspace_lab.errors import Interrupted, UserError, did_you_mean, nearest

MISTAKES = {
    "method=galor": "'galore'",
    "+experiment=galore_llama60m": "galore_llama60m_c4",
    "metod=galore": "'method=galore'",
    "models=llama_60m": "'model=llama_60m'",
    "metod.rank=3": "'method'",
    "method.rnk=4": "'method.rank'",
    "rank=8": "'method.rank'",
    "variant=release": "'method.variant'",
    "batch_size=4": "'data.batch_size'",
    "max_stepss=4": "'trainer.max_steps'",
    "data.rank=4": "'method.rank'",
    "method.rank.deep=3": "no keys",
    "trainer.max_steps": "write trainer.max_steps=",
    "lits": "'subspace-lab list'",
    "optimizer=adam,sgd": "add -m",
    "name=${nope}": "name=${nope}",
    "data.files=[a": "quote the value",
    "+method.rnk=4": "'method.rank'",
    "++trainer.max_stepz=4": "'trainer.max_steps'",
    "+foo=1": "unknown key 'foo'",
    "+optimizer.lrr=1": "'optimizer.lr'",
    "optimizer.amsgrad=true": "+optimizer.amsgrad=",
    "seed=-1": "expected 0 or more",
    "seed=abc": "expected an integer",
    "method.rank=abc": "method.rank=abc",
    "method.variant=releas": "'release'",
    "trainer.devices=1.0": "trainer.devices=1",
    "compare=adamv": "'adam",
    "resume=outputs/nothing": "no such run folder",
    "--mutirun": "'--multirun'",
    "hydra.run.dirr=x": "--cfg hydra",
    "hydra/launcher=submitt": "hydra/launcher",
    "~method": "no 'method'",
    "data.files=x.txt": "data=text",
    "logger=null": "logger is one of: both, csv, wandb",
    "name=../elsewhere": "below paths.output_root",
    "paths.output_root=/proc/nowhere": "paths.output_root=",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_gets_one_line(command, tmp_path: Path, word: str) -> None:
    answer = command(word)
    assert answer.code == 2, answer.err
    assert MISTAKES[word] in answer.err
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "method=glob(x*)"], "no job"),
        (["-m", "trainer=ddp", "trainer.devices=2", "seed=1,2"], "hydra/launcher=submitit_slurm"),
        (["-m", "trainer=ddp", "trainer.devices=2", "seed=1,2"], "hydra/launcher=submitit_slurm"),
        (["-m", "method=none,galor"], "'galore'"),
        (["method=none", "method.rank=8"], "only method=galore"),
        (["method=none", "subspace=random"], "does not work in a subspace"),
        (["-m", "method=none,null"], "method=null: a run needs one"),
        (["list", "metods"], "'methods'"),
        (["completion", "basch"], "'bash'"),
        (["resume", "nowhere"], "no run folder"),
    ],
)
def test_a_mistake_in_several_words(command, tmp_path: Path, words: list[str], expected: str) -> None:
    answer = command(*words)
    assert answer.code == 2, answer.err
    assert expected in answer.err and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback_wherever_it_stands(command) -> None:
    for words in (["--debug", "method=galor"], ["method=galor", "--debug"]):
        answer = command(*words)
        assert answer.code == 2
        assert "Traceback" in answer.err and "MissingConfigException" in answer.err


def test_hydra_full_error_means_debug_only_if_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBSPACE_DEBUG", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert cli._debug_mode([])
    monkeypatch.setenv("SUBSPACE_DEBUG", "0")  # a rank started by a run whose user did not ask
    assert not cli._debug_mode([])
    assert cli._debug_mode(["--debug"])


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("no such thing", hint="did you mean 'x'?"), 2, "error: no such thing; did you mean 'x'?"),
        (Interrupted("saved; continue with subspace-lab resume RUN"), 130, "continue with"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OutOfMemoryError("CUDA out of memory"), 2, "data.batch_size"),
        (MemoryError(), 2, "data.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "model.gradient_checkpointing"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x.ckpt"), 2, "/runs/x.ckpt"),
        (ZeroDivisionError("division\nby zero"), 1, "--debug"),
    ],
)
def test_how_exceptions_are_told(capsys: pytest.CaptureFixture[str], error, code: int, expected: str) -> None:
    assert cli.render(error, debug=False) == code
    text = capsys.readouterr().err
    assert expected in text and text.count("\n") == 1


def test_a_wrapped_user_error_is_still_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise UserError("rank=0: expected 1 or more")
        except UserError as inner:
            raise RuntimeError("Error in call to target") from inner
    except RuntimeError as outer:
        assert cli.render(outer, debug=False) == 2
    assert "rank=0" in capsys.readouterr().err


def test_out_of_memory_inside_a_wrapped_error_is_recognised(command, fake_run) -> None:
    def run(cfg: object) -> None:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        except RuntimeError as error:
            raise ValueError("Error in call to target") from error

    fake_run(run)
    answer = command()
    assert answer.code == 2 and answer.err.startswith("error: out of memory")


@pytest.mark.parametrize("kept", ["", "metrics.csv", "mine.txt", "checkpoints", "command.txt"])
def test_a_mistake_found_late_takes_its_folder_away_unless_it_holds_something(command, fake_run, kept: str) -> None:
    places = []

    def run(cfg) -> None:
        folder = Path(cfg.paths.output_dir)
        places.append(folder)
        (folder / "command.txt").write_text("subspace-lab\n")
        (folder / "metrics.csv").write_text("step,train/loss\n")
        if kept:
            (folder / kept).write_text("two\nlines\n")
        raise UserError("no such file")

    fake_run(run)
    assert command().code == 2
    assert places[0].exists() == bool(kept)
    assert places[0].parent.exists() == bool(kept)


def test_a_choice_of_null_where_there_is_none_is_no_mistake(command, fake_run) -> None:
    fake_run(lambda cfg: None)
    answer = command("experiment=null", "debug=null", "subspace=null")
    assert answer.code == 0, answer.err


def test_a_bug_names_the_log(command, fake_run) -> None:
    def run(cfg: object) -> None:
        raise ZeroDivisionError("in the middle")

    fake_run(run)
    answer = command()
    assert answer.code == 1
    line = answer.err.strip().splitlines()[-1]
    assert line.startswith("bug: ZeroDivisionError: in the middle") and "run.log" in line
    log = Path(line.split("log: ")[1].split(";")[0])
    assert "Traceback" in log.read_text()


def test_nearest_names() -> None:
    assert nearest("galor", ["galore", "none"]) == "galore"
    assert nearest("cosine", ["cosine_warmup", "constant"]) == "cosine_warmup"
    assert nearest("LLaMA-1B", ["llama_1b", "llama_7b"]) == "llama_1b"
    assert nearest("xyz", ["galore", "none"]) is None
    assert did_you_mean("xyz", ["galore"]) == ""


def test_a_user_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("wrong", hint="right")))
    assert (error.message, error.hint) == ("wrong", "right")
