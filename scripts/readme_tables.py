"""Write the README's tables of methods, subspaces and optimizers from the files of conf/.

python scripts/readme_tables.py          rewrite README.md between its markers
python scripts/readme_tables.py --check  exit 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from subspace_lab import catalog

README = Path(__file__).resolve().parents[1] / "README.md"
GROUPS = ("method", "scenario", "federation", "subspace", "optimizer", "model", "data")


def table(group: str) -> str:
    """One markdown table of a group's options, their descriptions and papers."""
    rows = [f"| `{group}=` | what | source |", "|---|---|---|"]
    rows += [f"| `{e.name}` | {e.description} | {e.paper or '–'} |" for e in catalog.entries(group)]
    return "\n".join(rows)


def rewritten(text: str) -> str:
    """The README with every table between `<!-- GROUP -->` and `<!-- /GROUP -->` renewed."""
    for group in GROUPS:
        begin, end = f"<!-- {group} -->", f"<!-- /{group} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            _, _, tail = rest.partition(end)
            text = f"{head}{begin}\n{table(group)}\n{end}{tail}"
    return text


def main() -> int:
    """Rewrite or check."""
    now = README.read_text(encoding="utf-8")
    new = rewritten(now)
    if "--check" in sys.argv:
        return int(new != now)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
