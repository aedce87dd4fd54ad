"""Shell completion without Hydra: commands, groups, options and dotted keys, read from conf/ in no time."""

from __future__ import annotations

from subspace_lab import catalog
from subspace_lab.errors import UserError, did_you_mean

COMMANDS = ("list", "doctor", "sbatch", "resume", "report", "rebuild", "compress", "completion")
FLAGS = ("--help", "--version", "--debug", "--multirun", "--cfg", "--resolve", "--config-dir", "--hydra-help")
COMMAND_FLAGS = {
    "rebuild": ("--output", "--device", "--theta0"),
    "compress": ("--levels", "--bits", "--finetune", "--choices", "--delta", "--device"),
}
VALUES = {"resume": ("auto", "null"), "estimate": ("true", "false"), "export": ("true", "false")}

# The shells split words differently (bash at "="): each script hands over the words as typed, to complete the last.
_BASH = """\
_subspace_lab() {
    local line="${COMP_LINE:0:COMP_POINT}" words word prefix
    read -ra words <<<"$line"
    [[ "$line" == *" " ]] && words+=("")
    word="${words[-1]}"
    mapfile -t COMPREPLY < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    # Bash replaces only what follows the last "=".
    prefix="${word%"${word##*=}"}"
    [[ -n "$prefix" ]] && COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    [[ "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace
    [[ ${#COMPREPLY[@]} -eq 0 || -z "${COMPREPLY[0]}" ]] && { COMPREPLY=(); compopt -o default; }
}
complete -F _subspace_lab subspace-lab
"""
_ZSH = """\
#compdef subspace-lab
_subspace_lab() {
    local -a found
    found=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z "${found[1]}" ]]; then _files; return; fi
    compadd -S '' -- "${(@)found:#*[^=.]}"
    compadd -- "${(@)found:#*[=.]}"
}
compdef _subspace_lab subspace-lab
"""
_FISH = """\
function __subspace_lab
    set -l words (commandline -opc) (commandline -ct)
    $words[1] __complete $words[2..-1] 2>/dev/null
end
complete -c subspace-lab -a '(__subspace_lab)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(words: list[str]) -> str:
    """Return the completion script of a shell.

    Args:
        words: the shell's name, alone.

    Raises:
        UserError: no or another shell.
    """
    if len(words) != 1 or words[0] not in _SCRIPTS:
        given = words[0] if words else ""
        hint = did_you_mean(given, _SCRIPTS) or "subspace-lab completion bash"
        raise UserError(f"completion takes one shell: {', '.join(_SCRIPTS)}", hint=hint)
    return _SCRIPTS[words[0]]


def candidates(words: list[str]) -> list[str]:
    """Return what the last word could become; the words before it are the rest of the command line.

    `met` becomes `method=` and `method.`; `method=g` the options; `method.r` the keys of the chosen option.
    """
    word = words[-1] if words else ""
    before = words[:-1]
    if before[:1] == ["list"]:
        found = [*catalog.groups(), *catalog.PLURALS]
    elif before[:1] == ["completion"]:
        found = list(_SCRIPTS)
    elif before and before[0] in COMMAND_FLAGS:
        found = [
            *(COMMAND_FLAGS[before[0]] if word.startswith("-") else ())
        ]  # files and numbers: the shell's, the user's
    elif before[:1] in (["report"], ["doctor"]) or before == ["resume"]:
        found = []  # folders: the shell's own business
    elif "=" in word:
        found = _values(word)
    elif "." in word:
        found = _keys(word.split(".", 1)[0], before)
    else:
        found = [*_top_level(), *(() if before else COMMANDS), *(FLAGS if word.startswith("-") else ())]
    return sorted({item for item in found if item.startswith(word)})


def _top_level() -> list[str]:
    names = catalog.groups()
    with_keys = [f"{name}." for name in names if catalog.keys(name)]
    return [*(f"{name}=" for name in names), *with_keys, *(f"{key}=" for key in catalog.root_keys())]


def _values(word: str) -> list[str]:
    key, _, typed = word.partition("=")
    options = catalog.options(key.lstrip("+")) or list(VALUES.get(key, ()))
    # In a sweep (`method=galore,no`) the last value is the one being typed.
    done = typed.rpartition(",")[0]
    start = f"{key}={done}," if done else f"{key}="
    return [start + option for option in options]


def _keys(group: str, before: list[str]) -> list[str]:
    chosen = next((word.split("=", 1)[1] for word in before if word.startswith(f"{group}=")), None)
    option = chosen if chosen in catalog.options(group) else None
    names = catalog.keys(group, option)
    return [f"{group}.{name}=" for name in names if not any(other.startswith(f"{name}.") for other in names)]
