"""CLIP's image encoders through transformers, the vision towers that were fine-tuned from them, and zero-shot heads.

Radford et al., ICML 2021, arXiv 2103.00020. An image's feature is the projection of its pooled output; a class is the
mean direction of its prompts' text features; the logit is exp(logit scale) times their cosine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.models.heads import CosineHead

TOWER = "vision_model."
_HINT = "a folder that transformers' save_pretrained wrote; with a network a name on the hub is downloaded once"
_BATCH = 256  # prompts at a time


class ClipImageEncoder(nn.Module):
    """Images -> features, the tensors named as in transformers' `CLIPVisionModelWithProjection`.

    Args:
        clip: one of them.
        path: where it is from: a name on the hub or a folder.
    """

    def __init__(self, clip: Any, path: str) -> None:
        super().__init__()
        self.path = path
        self.side = int(clip.config.image_size)
        self.vision_model: nn.Module = clip.vision_model
        self.visual_projection: nn.Module = clip.visual_projection

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Features (n, f) of normalised images (n, 3, side, side)."""
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=images).pooler_output)
        return features


def build_clip_encoder(*, path: str) -> nn.Module:
    """The image half of a CLIP model, with its projection.

    Args:
        path: a name on the Hugging Face hub, or a folder with config.json and weights of a CLIP model.

    Raises:
        UserError: no such folder, offline and not cached, another kind of model.
    """
    from transformers import CLIPVisionModelWithProjection

    return ClipImageEncoder(_read(CLIPVisionModelWithProjection, path, "model.path"), path)


def read_tower(path: str, option: str, like: ClipImageEncoder) -> dict[str, Tensor]:
    """The tensors of a vision tower, as fine-tuned models are published: without the projection.

    Args:
        path: a name on the hub, or a folder.
        option: what asked for it, for messages.
        like: the encoder that they belong in.

    Returns:
        name in the encoder -> float32.

    Raises:
        UserError: it cannot be read, or is of another architecture.
    """
    from transformers import CLIPVisionModel

    tower: nn.Module = _read(CLIPVisionModel, path, option)
    found = {TOWER + name.removeprefix(TOWER): tensor for name, tensor in tower.state_dict().items()}
    own = {name: tensor for name, tensor in like.state_dict().items() if name.startswith(TOWER)}
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if wrong or len(found) != len(own):
        name = (wrong or [name for name in found if name not in own])[0]
        theirs, ours = (tuple(state[name].shape) if name in state else "absent" for state in (found, own))
        raise UserError(f"{option}={path}: {name} is {theirs} there and {ours} in {like.path}", hint="model=clip_vit_…")
    return found


class ZeroShot:
    """Frozen heads from a CLIP model's text encoder, which is read once.

    Args:
        path: of the CLIP model: a name on the hub or a folder.
        device: where texts are encoded.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        clip: Any = _read(CLIPModel, path, "model.path")
        self._tokenizer: Any = _read(CLIPTokenizer, path, "model.path")
        self._device = torch.device(device)
        self._text: nn.Module = clip.text_model.to(device).eval()
        self._projection: nn.Module = clip.text_projection.to(device)
        self.gamma = float(clip.logit_scale.detach().double().exp())

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Directions (n, f) of texts, float32 of unit length."""
        found = []
        for first in range(0, len(texts), _BATCH):
            tokens = self._tokenizer(
                list(texts[first : first + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            given = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
            pooled = self._text(**given).pooler_output
            found.append(nn.functional.normalize(self._projection(pooled).float(), dim=1))
        return torch.cat(found)

    def head(self, classes: Sequence[str], prompts: Sequence[str]) -> CosineHead:
        """One direction for every class: the mean over the prompts.

        Args:
            classes: their names.
            prompts: with {} for a name.
        """
        texts = [prompt.replace("{}", name) for name in classes for prompt in prompts]
        means = self.features(texts).view(len(classes), len(prompts), -1).mean(1)
        head = CosineHead(means.shape[1], len(classes), self.gamma).to(self._device)
        head.weight.data.copy_(nn.functional.normalize(means, dim=1))
        return head.eval().requires_grad_(False)


def _read(kind: Any, path: str, option: str) -> Any:
    """`kind.from_pretrained(path)`, quietly, from the cache if it is there.

    Raises:
        UserError: it cannot be read.
    """
    from transformers.utils import logging

    from subspace_lab.data.hub import hub_error, require_network

    hf_logging: Any = logging  # without annotations of its own
    folder = Path(path).expanduser()
    if not folder.is_dir() and path.startswith((".", "/", "~")):
        near = (
            did_you_mean(folder.name, [item.name for item in folder.parent.iterdir()])
            if folder.parent.is_dir()
            else None
        )
        raise UserError(f"{option}={path}: no such folder", hint=near or _HINT)
    name = str(folder) if folder.is_dir() else path
    options = {} if "Tokenizer" in kind.__name__ else {"dtype": torch.float32}
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        try:
            return kind.from_pretrained(name, local_files_only=True, **options)
        except (OSError, ValueError):
            if folder.is_dir() or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
                raise
            require_network()
            return kind.from_pretrained(name, **options)
    except Exception as error:
        raise hub_error("", f"{option}={path} from a folder or the Hugging Face hub", error, _HINT) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()
