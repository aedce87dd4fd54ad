"""What an optimizer must know about sharded tensors (DTensor, FSDP2): the part that is here, how the whole is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(t: Tensor) -> bool:
    """Whether several processes hold parts of this tensor."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must ask); any other as it is."""
    gather = getattr(t, "full_tensor", None)
    return gather() if gather is not None else t


def sharded_dimension(t: Tensor) -> int:
    """The dimension along which a sharded tensor is cut.

    Raises:
        ValueError: it is cut along several, or along none.
    """
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(t, DTensor)
    cuts = [p.dim for p in t.placements if isinstance(p, Shard)]
    if len(cuts) != 1 or t.device_mesh.ndim != 1:
        raise ValueError(f"a weight must be cut along one dimension among one group of processes, not {t.placements}")
    return cuts[0]


def group_of(t: Tensor) -> ProcessGroup:
    """The processes that hold a sharded tensor."""
    from torch.distributed.tensor import DTensor

    assert isinstance(t, DTensor)
    return t.device_mesh.get_group()


def like(part: Tensor, whole_shape: tuple[int, ...], owner: Tensor) -> Tensor:
    """The sharded tensor (its first dimension cut as `owner` is) of which this process has `part`.

    Args:
        part: (rows here, …).
        whole_shape: of the whole.
        owner: a sharded parameter.
    """
    import torch
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(owner, DTensor)
    stride = torch.empty(whole_shape, device="meta").stride()
    return DTensor.from_local(
        part, owner.device_mesh, [Shard(0)], run_check=False, shape=torch.Size(whole_shape), stride=stride
    )


def spread(state: dict[str, Any], owner: Tensor) -> dict[str, Any]:
    """An optimizer's whole state of one parameter, its tensors cut as the parameter is if that is sharded."""
    if not is_sharded(owner):
        return state
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(owner, DTensor)
    mesh, cuts = owner.device_mesh, owner.placements
    return {
        # No process waits for another: each has the whole, from the same file.
        k: distribute_tensor(v.to(owner.device), mesh, cuts, src_data_rank=None)
        if isinstance(v, Tensor) and v.shape == owner.shape and not is_sharded(v)
        else v
        for k, v in state.items()
    }
