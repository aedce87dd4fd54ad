"""Models with encoder and decoder that answer in one word: the first token of the answer is all that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.errors import UserError

INNER = "model."


class FirstToken(nn.Module):
    """Prompts -> logits of the answer's first token.

    Args:
        model: transformers' model with encoder and decoder.
        path: where it is from.
    """

    def __init__(self, model: Any, path: str) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.path = path
        self.pad, self.start = int(model.config.pad_token_id), int(model.config.decoder_start_token_id)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        """Logits (n, vocabulary) of token ids (n, length), filled up with the padding token."""
        begin = ids.new_full((len(ids), 1), self.start)
        mask = ids.ne(self.pad).long()
        found = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=begin, use_cache=False)
        logits: Tensor = found.logits[:, 0]
        return logits


class AnswerHead(nn.Module):
    """Logits of the first token -> logits of the answers, and of anything else together.

    Args:
        tokens: the first token of each answer.

    Raises:
        UserError: two answers begin alike.
    """

    tokens: Tensor

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        if len(set(tokens)) < len(tokens):
            raise UserError("two answers begin with the same token: the first token does not tell them apart")
        self.register_buffer("tokens", torch.tensor(list(tokens)))

    @override
    def forward(self, logits: Tensor) -> Tensor:
        """(n, vocabulary) -> (n, answers + 1), float32."""
        logits = logits.float()
        others = logits.index_fill(1, self.tokens, float("-inf")).logsumexp(1, keepdim=True)
        return torch.cat([logits[:, self.tokens], others], dim=1)


def build_first_token(*, path: str) -> nn.Module:
    """A pretrained model with encoder and decoder, asked for the first token of its answer.

    Args:
        path: a name on the Hugging Face hub, or a folder with config.json and weights.

    Raises:
        UserError: it cannot be read, or has no encoder.
    """
    from subspace_lab.models.sequence_models import build_pretrained

    return FirstToken(build_pretrained(path=path, data_form="seq2seq"), path)


def read_tuned(path: str, option: str, like: FirstToken) -> dict[str, Tensor]:
    """The weights of a fine-tuned model: whole, or a LoRA adapter, which is added to the base.

    Args:
        path: a name on the hub, or a folder.
        option: what asked for it, for messages.
        like: the base.

    Returns:
        name in `like` -> tensor, tied ones once.

    Raises:
        UserError: it cannot be read, or is of another architecture.
    """
    from subspace_lab.data.hub import hub_error, require_network
    from subspace_lab.models.sequence_models import build_pretrained

    folder = Path(path).expanduser()
    if not folder.is_dir() and path.startswith((".", "/", "~")):
        raise UserError(f"{option}={path}: no such folder")
    try:
        if not folder.is_dir():
            require_network()
        adapted = _is_adapter(path)
        model: Any = build_pretrained(path=like.path if adapted else path, data_form="seq2seq")
        if adapted:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except UserError:
        raise
    except Exception as error:
        raise hub_error("", f"{option}={path} from a folder or the Hugging Face hub", error, "") from error
    found = {INNER + name: p.detach() for name, p in model.named_parameters()}
    own = dict(like.named_parameters())
    wrong = sorted(name for name in own.keys() | found.keys() if _shape(own, name) != _shape(found, name))
    if wrong:
        theirs, ours = _shape(found, wrong[0]), _shape(own, wrong[0])
        raise UserError(
            f"{option}={path}: {wrong[0]} is {theirs or 'absent'} there and {ours or 'absent'} in {like.path}"
        )
    return found


def _shape(state: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _is_adapter(path: str) -> bool:
    name = "adapter_config.json"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / name).is_file()
    from huggingface_hub import file_exists

    return file_exists(path, name)
