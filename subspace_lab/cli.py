"""The command line: standard library only, so that help, lists and completion answer before anything heavy is imported.

Everything that is not one of the commands below goes to Hydra (`subspace_lab.app`). This is also the one place that
turns exceptions into a line and an exit code: 2 for what the user can mend, 130 for Ctrl-C and other signals, 1 for a
bug of ours.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

from subspace_lab import catalog, interrupt
from subspace_lab._version import __version__
from subspace_lab.errors import Interrupted, UserError

HELP = """\
Subspace Lab: train inside a subspace.

  subspace-lab                                    a small LLaMA learns Python's own sources with GaLore (a minute)
  subspace-lab method=galore data=c4 model=llama_1b
  subspace-lab method=galore method.rank=64 optimizer.lr=0.005 trainer.max_steps=2000
  subspace-lab experiment=galore_llama60m_c4      a published table or figure
  subspace-lab -m method=galore,none seed='range(0,3)'   a sweep: every combination, one run after another

Commands
  list [GROUP]              what there is to choose, with the papers (groups: {groups})
  resume RUN_DIR [KEY=VALUE …]   continue a run; or give the first command again with resume=auto
  report DIR … [--markdown] [--csv FILE] [--metric NAME] [--baseline KEY=VALUE]   compare runs; plots of a sweep
  rebuild FILE [--output DIR]    make the whole model again from a solution.safetensors, a .sid file or a run folder
  compress RUN_DIR [--bits 3,4,5] [--finetune EPOCHS]   code a subspace run in a few hundred bytes, with an error bound
  sbatch [-m] [KEY=VALUE …] print the SLURM batch script of that run or sweep:  subspace-lab sbatch … | sbatch
  doctor                    check torch, CUDA, data, SLURM, W&B, and say how to mend what is broken
  completion bash|zsh|fish  print the completion script:  source <(subspace-lab completion bash)

Keys most runs change
  method.rank  method.refresh_every  method.scale  optimizer.lr  trainer.max_steps  trainer.checkpoint_every
  data.batch_size  data.files  seed  resume=auto  estimate=true (memory table, no training)  debug=fast (a few steps)

Flags
  -m, --multirun            run a sweep
  -c, --cfg job             print the configuration instead of running (with --resolve: interpolations filled in)
  --config-dir DIR          a folder of your own configuration groups
  --debug                   show the traceback of an error
  --version, --help         --hydra-help shows Hydra's own flags
"""

OUT_OF_MEMORY = (
    "make data.batch_size smaller, or try trainer.precision=bf16-true, method.per_layer=true, "
    "model.gradient_checkpointing=true"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the words after the program's name; those of this process if None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _debug_mode(words)
    words = [word for word in words if word != "--debug"]
    interrupt.install()
    try:
        return _dispatch(words)
    except BrokenPipeError:
        # `subspace-lab list | head`: nobody reads on, which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return render(error, debug=debug)


def render(error: BaseException, *, debug: bool) -> int:
    """Print one line about an exception on stderr and return the exit code; with `debug` its traceback comes first."""
    if debug:
        import traceback

        traceback.print_exception(error)
    for link in _chain(error):
        if isinstance(link, UserError):
            return _say("error", link.message, link.hint, code=2)
        if isinstance(link, Interrupted):
            return _say("stopped", str(link), None, code=130)
        if isinstance(link, KeyboardInterrupt):
            return _say("stopped", "interrupted", None, code=130)
        if _is_out_of_memory(link):
            return _say("error", "out of memory", OUT_OF_MEMORY, code=2)
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {link.filename}" if link.filename else ""
            return _say(
                "error",
                f"no space left on the disk{where}",
                "free some, or choose another with paths.output_root=",
                code=2,
            )
        if isinstance(link, OSError) and link.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _say("error", f"{link.strerror}: {link.filename}", "it is not ours to read or write", code=2)
    text = " ".join(str(error).split()) or "no message"
    place = getattr(error, "log_path", None)
    hint = f"log: {place}; " if place else ""
    return _say("bug", f"{type(error).__name__}: {text}", f"{hint}rerun with --debug for the traceback", code=1)


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else ""
    if any(word in ("--help", "-h") for word in words):
        print(HELP.format(groups=", ".join(catalog.groups())), end="")
        return 0
    if command == "--version":
        print(f"subspace-lab {__version__}")
        return 0
    run = _COMMANDS.get(command)
    return run(words[1:]) if run is not None else _run(words)


def _run(words: list[str]) -> int:
    from subspace_lab import app

    return app.main(words)


def _resume(words: list[str]) -> int:
    from subspace_lab import app

    return app.resume(words)


def _report(words: list[str]) -> int:
    from subspace_lab.reporting.command import main as report

    return report(words)


def _rebuild(words: list[str]) -> int:
    from subspace_lab.compression.commands import rebuild

    return rebuild(words)


def _compress(words: list[str]) -> int:
    from subspace_lab.compression.commands import compress

    return compress(words)


def _sbatch(words: list[str]) -> int:
    from subspace_lab.cluster.commands import main as sbatch

    return sbatch(words)


def _doctor(words: list[str]) -> int:
    if words:
        raise UserError(f"doctor takes no argument, got '{words[0]}'")
    from subspace_lab.doctor import main as doctor

    return doctor()


def _list(words: list[str]) -> int:
    if words:
        groups = [catalog.group_named(word) for word in words]
    else:
        known = catalog.groups()
        groups = [group for group in catalog.MAIN_GROUPS if group in known]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    for position, group in enumerate(groups):
        entries = catalog.entries(group)
        print(f"{chr(10) if position else ''}{group}=")
        column = max(len(entry.name) for entry in entries) + 4
        for entry in entries:
            indent = " " * column
            text = entry.description + (f"  [{entry.paper}]" if entry.paper else "")
            lines = textwrap.wrap(text, max(width - column, 30), break_on_hyphens=False) or [""]
            print(
                f"  {entry.name.ljust(column - 2)}{lines[0]}".rstrip(), *(indent + line for line in lines[1:]), sep="\n"
            )
    return 0


def _completion(words: list[str]) -> int:
    from subspace_lab import completion

    print(completion.script(words), end="")
    return 0


def _complete(words: list[str]) -> int:
    from subspace_lab import completion

    print("\n".join(completion.candidates(words)))
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "sbatch": _sbatch,
    "doctor": _doctor,
    "resume": _resume,
    "report": _report,
    "rebuild": _rebuild,
    "compress": _compress,
    "completion": _completion,
    "__complete": _complete,
}


def _debug_mode(words: list[str]) -> bool:
    """Return whether tracebacks are wanted, and let Hydra raise its errors so that `render` prints them.

    The ranks that Lightning starts inherit HYDRA_FULL_ERROR from us; SUBSPACE_DEBUG tells them whether the user set it.
    """
    inherited = os.environ.get("SUBSPACE_DEBUG")
    asked = inherited == "1" if inherited is not None else os.environ.get("HYDRA_FULL_ERROR") == "1"
    debug = asked or "--debug" in words
    os.environ["SUBSPACE_DEBUG"] = "1" if debug else "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    return debug


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in links:
        links.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return links


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch is not imported here, and its CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _say(word: str, message: str, hint: str | None, *, code: int) -> int:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    headline = f"\033[31m{word}\033[0m" if colour else word
    print(f"{headline}: {message}" + (f"; {hint}" if hint else ""), file=sys.stderr)
    return code
