"""Sentence classifiers through transformers: pretrained by name or folder, or a small BERT with random weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.models.initialization import initialize_named

_HINT = "model.path=/a/folder with the model; with a network it is downloaded once"


def build_pretrained(*, path: str, data_tokens: int | None = None, data_classes: int | None = None) -> nn.Module:
    """A pretrained encoder with a new classification head, drawn as in `initialization` with the model's own std.

    Args:
        path: a name on the Hugging Face hub, or a folder with config.json and weights.
        data_tokens: size of the data's vocabulary; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: no such folder, offline and not cached, or a vocabulary smaller than the tokenizer's.
    """
    if data_classes is None:
        raise UserError("this model classifies sentences and takes the number of classes from them", hint="data=mrpc")
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as hf_logging

    folder = Path(path).expanduser()
    if not folder.is_dir() and path.startswith((".", "/", "~")):
        raise UserError(f"model.path={path}: no such folder", hint=_HINT)
    name = str(folder) if folder.is_dir() else path
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)  # a new head is what was asked for
    try:
        model: Any = _load(AutoModelForSequenceClassification, name, data_classes)
    except Exception as error:
        from subspace_lab.data.hub import hub_error

        raise hub_error("", f"model.path={path} from a folder or the Hugging Face hub", error, _HINT) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if data_tokens is not None and model.config.vocab_size < data_tokens:
        raise UserError(
            f"model.path={path} has {model.config.vocab_size} token embeddings, data.tokenizer {data_tokens} tokens",
            hint="data.tokenizer: the model's own",
        )
    assert isinstance(model, nn.Module)
    return model


def _load(kind: Any, name: str, classes: int) -> Any:
    from torch._guards import detect_fake_mode

    from subspace_lab.data.hub import require_network

    if detect_fake_mode() is not None:  # `estimate=true` wants shapes, not weights
        from transformers import AutoConfig

        return kind.from_config(AutoConfig.from_pretrained(name, num_labels=classes))
    arguments = {"num_labels": classes, "output_loading_info": True}
    try:
        model, told = kind.from_pretrained(name, local_files_only=True, **arguments)
    except (OSError, ValueError):
        if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise
        require_network()
        model, told = kind.from_pretrained(name, **arguments)
    initialize_named(model, told["missing_keys"], model.config.initializer_range)
    return model


def build_bert(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_layers: int,
    max_position_embeddings: int = 512,
    data_tokens: int | None = None,
    data_pad_id: int | None = None,
    data_classes: int | None = None,
) -> nn.Module:
    """A BERT classifier from random initialisation (std 0.02), for tests and machines without pretrained weights.

    Args:
        hidden_size: model width.
        intermediate_size: width of the MLP.
        num_heads: attention heads.
        num_layers: transformer blocks.
        max_position_embeddings: longest example, in tokens.
        data_tokens: size of the data's vocabulary; given by the runner.
        data_pad_id: the token that pads; given by the runner.
        data_classes: number of classes; given by the runner.

    Raises:
        UserError: heads do not divide the width, or no data to take the sizes from.
    """
    if data_tokens is None or data_classes is None:
        raise UserError("this model classifies sentences and takes its sizes from them", hint="data=mrpc")
    if hidden_size % num_heads:
        raise UserError(f"model.hidden_size={hidden_size} is not divisible by model.num_heads={num_heads}")
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=data_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_hidden_layers=num_layers,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=data_pad_id or 0,
    )
    config.num_labels = data_classes
    model = BertForSequenceClassification(config)
    initialize_named(model, [name for name, _ in model.named_parameters()], config.initializer_range)
    return model
