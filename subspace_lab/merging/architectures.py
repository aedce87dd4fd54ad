"""The permutations of a network's hidden units, found from the names and shapes of its tensors.

Three families: `chain`, layers one after the other (mlp, fc, lenet, small_cnn, vgg13_bn, GPM's AlexNet); `resnet`,
torchvision's and GPM's residual networks; `vit`, transformers of image encoders as timm, torchvision, open_clip and
Hugging Face name them.  Outputs are never permuted, and where there is no head that reads them, nor are features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from subspace_lab.errors import UserError
from subspace_lab.merging.permutations import Axis, Heads, PermutationSpec, SpecBuilder, one
from subspace_lab.merging.sources import TensorInfo

Family = Literal["auto", "chain", "resnet", "vit"]

_STAGE = re.compile(r"^(?P<prefix>.*?)layer(?P<stage>\d+)\.(?P<block>\d+)\.")
_BLOCK = re.compile(r"^(?P<path>(?:.*?\.)?(?:blocks|resblocks|layers|layer|h)\.(?:encoder_layer_)?\d+)\.(?P<rest>.+)$")
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|q|q_proj|query|qkv|in_proj)([._]|$)")
_ROLES: dict[str, re.Pattern[str]] = {
    "fused": re.compile(r"(^|\.)(qkv|in_proj|Wqkv|qkv_proj)$"),
    "query": re.compile(r"(^|\.)(q|query|q_proj|to_q|wq)$"),
    "key": re.compile(r"(^|\.)(k|key|k_proj|to_k|wk)$"),
    "value": re.compile(r"(^|\.)(v|value|v_proj|to_v|wv)$"),
    "output": re.compile(r"att\w*\.(out|o|proj|output\.dense|to_out(\.0)?)$|(^|\.)(o|out|out_proj|o_proj|wo)$"),
    "up": re.compile(r"(^|\.)(fc1|c_fc|lin1|linear1|up|up_proj|intermediate\.dense|(mlp|ffn)\.0)$"),
    "down": re.compile(r"(^|\.)(fc2|c_proj|lin2|linear2|down|down_proj|(mlp|ffn)\.[23]|output\.dense)$"),
}
_HEAD = re.compile(r"(^|\.)(head|heads|fc|classifier|linear|head_dist)(\.|$)")


def find_spec(infos: Mapping[str, TensorInfo], family: Family = "auto", heads: int | None = None) -> PermutationSpec:
    """Find the permutations of a network.

    Args:
        infos: shapes of its tensors.
        family: of the network; auto: by the names.
        heads: of an attention layer, which no tensor tells; null: of 64 units each.

    Raises:
        UserError: not a network of that family, or of none that is known.
    """
    infos = {name: info for name, info in infos.items() if info.dtype.is_floating_point and info.numel}
    if family == "auto":
        if any(_ATTENTION.search(name) for name in infos):
            family = "vit"
        else:
            family = "resnet" if any(_STAGE.match(name) for name in infos) else "chain"
    if family == "vit":
        return _vit(infos, heads)
    return _resnet(infos) if family == "resnet" else _chain(infos)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _path(name: str) -> str:
    return name.rpartition(".")[0] or name


def _unknown(what: str) -> UserError:
    return UserError(
        f"weight matching: {what}",
        hint="there are specs for chains (mlp, fc, lenet, small_cnn, vgg13_bn), resnet (resnet18) and vit: method.spec",
    )


def _chain(infos: Mapping[str, TensorInfo]) -> PermutationSpec:
    builder = SpecBuilder(infos, "chain")
    weights = [name for name, info in infos.items() if len(info.shape) in (2, 3, 4, 5) and name.endswith("weight")]
    # Convolutions come before linear layers; state dicts in files are in any order.
    layers = sorted(weights, key=lambda name: (len(infos[name].shape) == 2, _natural(name)))
    if len(layers) < 2:
        raise _unknown(f"{len(layers)} layers with weights have no hidden units between them")
    paths = [_path(name) for name in layers]
    norms = sorted({_path(name) for name, i in infos.items() if len(i.shape) == 1} - set(paths), key=_natural)
    others = [name for name in infos if name not in layers and _path(name) not in (*paths, *norms)]
    if others:
        raise _unknown(f"{others[0]} of shape {infos[others[0]].shape} is no part of a chain of layers")
    before: str | None = None
    for name, path in zip(layers, paths, strict=True):
        columns = None if before is None else builder.read_by(name, before)
        last = name == layers[-1]
        before = None if last else builder.unit(path, infos[name].shape[0])
        builder.layer(path, None if before is None else one(before), columns)
    for number, path in enumerate(norms):
        layer = _normalised(path, number, paths)
        size = infos[next(name for name in infos if _path(name) == path)].shape[0]
        if builder.sizes.get(layer, size) != size:
            raise _unknown(f"{path} has {size} entries, {layer} before it {builder.sizes[layer]}")
        builder.norm(path, one(layer) if layer in builder.sizes else None)
    return builder.done()


def _normalised(path: str, number: int, layers: list[str]) -> str:
    """The layer that a normalisation follows: the last before it in a numbered list, else the one of its number."""
    parent, _, own = path.rpartition(".")
    if own.isdigit():
        same = [layer for layer in layers if layer.rpartition(".")[0] == parent and layer.rpartition(".")[2].isdigit()]
        earlier = [layer for layer in same if int(layer.rpartition(".")[2]) < int(own)]
        if earlier:
            return earlier[-1]
    if number < len(layers):
        return layers[number]
    raise _unknown(f"no layer is followed by {path}")


def _resnet(infos: Mapping[str, TensorInfo]) -> PermutationSpec:
    builder = SpecBuilder(infos, "resnet")
    found = {match.group(0): match for name in infos if (match := _STAGE.match(name))}
    if not found:
        raise _unknown("no tensor of a residual network (layer1.0.conv1.weight, …)")
    blocks = sorted(found, key=_natural)
    prefix = found[blocks[0]].group("prefix")
    heads = [n for n in infos if len(infos[n].shape) == 2 and n.endswith(".weight") and not _STAGE.match(n)]
    # Features that nobody here reads stay: from the last block with a projection on, everything adds to them.
    projected = [b for b in blocks if any(f"{b}{s}.0.weight" in infos for s in ("downsample", "shortcut"))]
    final = projected[-1] if projected else None
    stem = f"{prefix}conv1"
    if f"{stem}.weight" not in infos:
        raise _unknown(f"no {stem}.weight before {blocks[0]}conv1")
    stream: str | None = None
    if heads or final is not None:
        stream = builder.unit(f"{prefix}stem", infos[f"{stem}.weight"].shape[0])
    builder.layer(stem, _axis(stream), None)
    builder.norm(f"{prefix}bn1", _axis(stream))
    for block in blocks:
        entering, hidden = stream, stream
        convolutions = [k for k in (1, 2, 3) if f"{block}conv{k}.weight" in infos]
        if block in projected:
            name = block.removesuffix(".")
            fixed = block == final and not heads
            stream = None if fixed else builder.unit(name, infos[f"{block}conv{convolutions[-1]}.weight"].shape[0])
            for path in (f"{block}downsample", f"{block}shortcut"):
                builder.layer(f"{path}.0", _axis(stream), _axis(entering))
                builder.norm(f"{path}.1", _axis(stream))
        for k in convolutions:
            path, last = f"{block}conv{k}", k == convolutions[-1]
            out = stream if last else builder.unit(path, infos[f"{path}.weight"].shape[0])
            builder.layer(path, _axis(out), _axis(hidden))
            builder.norm(f"{block}bn{k}", _axis(out))
            hidden = out
    for name in heads:
        builder.layer(_path(name), None, None if stream is None else builder.read_by(name, stream))
    return _complete(builder, infos)


def _axis(units: str | None) -> Axis | None:
    return None if units is None else one(units)


def _vit(infos: Mapping[str, TensorInfo], heads: int | None) -> PermutationSpec:
    builder = SpecBuilder(infos, "vit")
    blocks: dict[str, list[str]] = {}
    for name in infos:
        if (match := _BLOCK.match(name)) is not None:
            blocks.setdefault(match.group("path"), []).append(name)
    norms = [info.shape[0] for names in blocks.values() for n in names if "norm" in n or "ln_" in n
             if len((info := infos[n]).shape) == 1]  # fmt: skip
    if not norms or len(set(norms)) != 1:
        raise _unknown("no tensors of transformer blocks of one width")
    d = norms[0]
    outside = [name for name in infos if not any(name in names for names in blocks.values())]
    read = any(_HEAD.search(name) and len(infos[name].shape) == 2 for name in outside)
    stream = one(builder.unit("stream", d)) if read else None
    for path in sorted(blocks, key=_natural):
        _transformer_block(builder, path, blocks[path], stream, heads)
    for name in outside:
        shape = infos[name].shape
        places = [axis for axis, n in enumerate(shape) if n == d]
        if len(places) > 1:  # square: a head reads the stream, tokens and positions have it last, patches write it
            reads = _HEAD.search(name) is not None
            places = [1] if reads else [len(shape) - 1] if re.search("pos|token|cls|class", name) else [0]
        if _HEAD.search(name) and len(shape) == 1:
            places = []
        builder.axes[name] = tuple(stream if axis in places[:1] else None for axis in range(len(shape)))
    return builder.done()


def _transformer_block(
    builder: SpecBuilder, path: str, names: list[str], stream: Axis | None, heads: int | None
) -> None:
    inside = sorted({re.sub(r"[._](weight|bias)$", "", name).removeprefix(f"{path}.") for name in names})
    maps = [own for own in inside if len(_weight(builder, f"{path}.{own}")) == 2]
    roles: dict[str, str] = {}
    for own in maps:
        role = next((role for role, pattern in _ROLES.items() if pattern.search(own)), None)
        if role is None or role in roles:
            raise _unknown(f"what {path}.{own} does in a transformer block is not clear from its name")
        roles[role] = f"{path}.{own}"
    attention = {"fused"} if "fused" in roles else {"query", "key", "value"}
    if not {"output", "up", "down", *attention} <= set(roles):
        missing = sorted({"output", "up", "down", *attention} - set(roles))
        raise _unknown(f"no {' or '.join(missing)} among the matrices of {path}")
    width = _weight(builder, roles["output"])[1]
    count = heads or (width // 64 if width % 64 == 0 and width >= 128 else 0)
    if count < 1 or width % count:
        raise UserError(
            f"method.heads={heads}: attention of width {width} in {path} does not tell its number of heads",
            hint="say method.heads",
        )
    qk, vo = builder.unit(f"{path}.qk", width), builder.unit(f"{path}.vo", width)
    builder.heads.append(Heads((qk, vo), count))
    if "fused" in roles:
        builder.layer(roles["fused"], Axis((qk, qk, vo)), stream)
    else:
        for role, units in (("query", qk), ("key", qk), ("value", vo)):
            builder.layer(roles[role], one(units), stream)
    builder.layer(roles["output"], stream, one(vo))
    hidden = builder.unit(f"{path}.hidden", _weight(builder, roles["up"])[0])
    builder.layer(roles["up"], one(hidden), stream)
    builder.layer(roles["down"], stream, one(hidden))
    for own in inside:
        if own not in maps:
            for name in names:
                if re.sub(r"[._](weight|bias)$", "", name) == f"{path}.{own}":
                    if builder.infos[name].shape != (builder.infos[name].numel,):
                        raise _unknown(f"{name} of shape {builder.infos[name].shape} is no part of a transformer block")
                    builder.place(name, stream)


def _weight(builder: SpecBuilder, path: str) -> tuple[int, ...]:
    for name in (f"{path}.weight", f"{path}_weight"):
        if name in builder.infos:
            return builder.infos[name].shape
    return ()


def _complete(builder: SpecBuilder, infos: Mapping[str, TensorInfo]) -> PermutationSpec:
    missing = [name for name in infos if name not in builder.axes]
    if missing:
        raise _unknown(f"{missing[0]} of shape {infos[missing[0]].shape} is no part of a {builder.family}")
    return builder.done()


def layer_groups(infos: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Tensors by layer, from the input on.

    The stem and each residual or transformer block; or each convolution with its bias; or, where there is none, each
    linear layer with its bias.  Tensors that belong to no such layer are in no group.
    """
    blocks: dict[str, list[str]] = {}
    for name in infos:
        if (match := _STAGE.match(name)) is not None:
            blocks.setdefault(match.group(0), []).append(name)
        elif (match := _BLOCK.match(name)) is not None and any(_ATTENTION.search(n) for n in infos):
            blocks.setdefault(match.group("path"), []).append(name)
    inside = {name for names in blocks.values() for name in names}
    outside = {name: info for name, info in infos.items() if name not in inside}
    maps = [name for name, info in outside.items() if len(info.shape) >= 2 and name.endswith("weight")]
    convolutions = [name for name in maps if len(infos[name].shape) > 2]
    if blocks:
        maps = convolutions or [name for name in maps if "patch" in name]
    elif convolutions:
        maps = convolutions
    layers = [[n for n in outside if _path(n) == _path(name)] for name in sorted(maps, key=_natural)]
    return layers + [blocks[path] for path in sorted(blocks, key=_natural)]
