"""What makes models unfit to be merged, found before anything is read, computed or written.

Rules for what is not alike but no error: tensors that are not of floating point (position indices, counters, masks) are
the base's, whatever the models have or lack; so are tensors that `merge.exclude` names; floating-point dtypes may
differ, the output has the base's; a tensor that is stored once for two uses (tied weights) is merged once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Merge
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.sources import TensorInfo

Infos = Mapping[str, TensorInfo]

_VOCABULARY = re.compile(r"(embed|wte|word_emb|lm_head|shared|embed_out|output_projection|score)[\w.]*(weight|bias)$")
_SHOWN = 3


def check_number(method: Merge, models: int, *, base: bool) -> Iterator[str]:
    """Lines about a missing base, and too few or too many models."""
    name = type(method).__name__
    if method.needs_base and not base:
        yield f"{name} merges what models have changed: give merge.base, the checkpoint they were fine-tuned from"
    if models < method.least:
        yield f"{name} merges {_number(method)}, got {models}"
    if method.most is not None and models > method.most:
        yield f"{name} merges {_number(method)}, got {models}"


def _number(method: Merge) -> str:
    if method.most == method.least:
        return f"exactly {method.least} models"
    return f"at least {method.least} models" if method.most is None else f"{method.least} to {method.most} models"


def check_tensors(base: Infos, models: Mapping[str, Infos], rules: TensorRules) -> Iterator[str]:
    """Lines about tensors that are missing, too many, of another shape or of another kind of number.

    Args:
        base: tensors of the base.
        models: of each model, by label.
        rules: which tensors are left alone, whatever they are.
    """
    for label, infos in models.items():
        wanted = {n for n, info in base.items() if info.dtype.is_floating_point and not rules.excluded(n)}
        # Where one says integer and the other floating point, that is the finding.
        missing = [name for name in base if name in wanted and name not in infos]
        extra = [
            name
            for name, info in infos.items()
            if name not in base and info.dtype.is_floating_point and not rules.excluded(name)
        ]
        prefix = _prefix(missing, extra)
        if prefix is not None:
            yield f"model {label}: tensors have other names than the base's: {prefix}"
        else:
            if missing:
                yield f"model {label} lacks {_some(missing)} of the base{_tied(missing)}"
            if extra:
                yield f"model {label} has {_some(extra)} that the base lacks"
        shared = [name for name in base if name in infos and not rules.excluded(name)]
        yield from _differing(label, base, infos, shared)


def _differing(label: str, base: Infos, infos: Infos, shared: Sequence[str]) -> Iterator[str]:
    vocabulary, shapes, kinds = [], [], []
    for name in shared:
        a, b = base[name], infos[name]
        if a.dtype.is_floating_point != b.dtype.is_floating_point:
            kinds.append(f"{name} is {_dtype(a)} in the base and {_dtype(b)} there")
        elif a.shape == b.shape or not a.dtype.is_floating_point:
            continue
        elif _VOCABULARY.search(name) and a.shape and a.shape[1:] == b.shape[1:]:
            vocabulary.append((name, a.shape[0], b.shape[0]))
        else:
            shapes.append(f"{name} is {_shape(a)} in the base and {_shape(b)} there")
    if vocabulary:
        name, ours, theirs = vocabulary[0]
        yield (
            f"model {label} has another vocabulary: {name} has {ours} rows in the base and {theirs} there "
            f"(merge.exclude=[{','.join(found for found, _, _ in vocabulary)}] keeps the base's)"
        )
    for found, what in ((shapes, "shape"), (kinds, "kind of number")):
        if found:
            more = f", and {len(found) - 1} more tensors of another {what}" if len(found) > 1 else ""
            yield f"model {label}: {found[0]}{more}"


def refuse(problems: Sequence[str]) -> None:
    """Raise all of them at once, one a line.

    Raises:
        UserError: there is one.
    """
    if problems:
        raise UserError("\n".join(problems))


def _prefix(missing: Sequence[str], extra: Sequence[str]) -> str | None:
    """How every name differs, if it is by the same beginning."""
    if not missing or len(missing) != len(extra):
        return None
    for longer, shorter, how in ((extra, missing, "'{0}' before each"), (missing, extra, "no '{0}' before each")):
        for found in longer:
            prefix = found.removesuffix(shorter[0])
            if prefix != found and {prefix + name for name in shorter} == set(longer):
                return how.format(prefix)
    return None


def _tied(missing: Sequence[str]) -> str:
    if any(name.endswith("lm_head.weight") for name in missing):
        return " (a head tied to the embedding is stored once: save both with or without it)"
    return ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    if len(names) == 1:
        return f"tensor {shown}"
    return f"{len(names)} tensors ({shown}{', …' if len(names) > _SHOWN else ''})"


def _shape(info: TensorInfo) -> str:
    return "×".join(map(str, info.shape)) or "a number"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
