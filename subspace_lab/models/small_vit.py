"""Small vision transformers for small images (timm's), drawn from integers like the other small networks."""

from __future__ import annotations

import torch
from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.models.initialization import bell_
from subspace_lab.models.shapes import Shape, need


def build_small_vit(
    *,
    patch: int = 2,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    position_std: float = 0.5,
    data_shape: Shape | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """A ViT (Dosovitskiy et al., ICLR 2021) without dropout, its features the class token's.

    Args:
        patch: side of a patch in pixels.
        dim: width.
        depth: blocks.
        heads: of attention.
        position_std: of the position embeddings' first values. On images this small they decide: with .02, the usual,
            training takes far longer to tell places apart.
        data_shape: (channels, height, width) of the data; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: images that do not divide into patches, a width that does not divide into heads.
    """
    (channels, height, width), classes = need(data_shape, data_classes)
    if height % patch or width % patch:
        raise UserError(f"model.patch={patch}: images of {height}×{width} pixels do not divide into such patches")
    if dim % heads:
        raise UserError(f"model.heads={heads}: expected a divisor of model.dim={dim}")
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=(height, width),
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
    )
    seed = torch.initial_seed()
    for name, parameter in model.named_parameters():
        key = derive_key("small_vit/1", seed, name)
        if name == "pos_embed":
            bell_(parameter, position_std, key)
        elif parameter.dim() > 1:
            # Not timm's .02: of so narrow a network hardly anything would come out of the blocks at first.
            bell_(parameter, parameter[0].numel() ** -0.5, key)
    return model
