"""`TextClassificationDataModule`: labelled sentences or pairs of them for a Hugging Face classifier."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from subspace_lab.data import glue
from subspace_lab.data.hub import hub_error, require_network
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices
from subspace_lab.data.supervised import Parts, SupervisedDataModule
from subspace_lab.errors import UserError

Encoded = dict[str, list[list[int]]]


class TextClassificationDataModule(SupervisedDataModule):
    """A GLUE task: train on a part of its training set, choose by the rest, report on its development set.

    Batches are `{"input_ids", "attention_mask"[, "token_type_ids"], "labels"}`, int64 (b, longest of the batch) and
    (b,); `token_type_ids` where the tokenizer makes them.

    Args:
        dataset: which task.
        tokenizer: the model's: a hub name, a folder of it, or a tokenizer.json; also below <data_dir>/tokenizers.
        max_length: tokens of an example, special ones included; the longer sentence of a pair is cut first.
        batch_size: examples per process and step.
        val_size: examples held out of the training set to choose models by; 0 as in `SupervisedDataModule`.
        train_fraction: share of the remaining training set to train on, in (0, 1]; smaller shares lie in larger ones.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: unused beside the hub's own cache; as for other data.
    """

    def __init__(
        self,
        dataset: glue.Dataset = "mrpc",
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        val_size: int = 368,
        train_fraction: float = 1.0,
        data_dir: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, val_size, train_fraction, data_dir, cache_dir)
        if dataset not in glue.LAYOUTS:
            raise UserError(f"data.dataset={dataset}: no such task", hint=f"one of {', '.join(glue.LAYOUTS)}")
        if tokenizer is None:
            raise UserError(
                "data.tokenizer has no value and this model names none",
                hint="data.tokenizer=bert-base-uncased, a folder with a tokenizer, or a tokenizer.json",
            )
        if max_length < 8:
            raise UserError(f"data.max_length={max_length}: expected at least 8")
        self._tokenizer_name, self._max_length = tokenizer, max_length

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for."""
        return load_tokenizer(self._tokenizer_name, self._data_dir)

    def model_arguments(self) -> dict[str, Any]:
        """`data_tokens` (size of the vocabulary), `data_pad_id` and `data_classes`."""
        tokenizer = self.tokenizer
        return {"data_tokens": len(tokenizer), "data_pad_id": tokenizer.pad_token_id, "data_classes": glue.CLASSES}

    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros of full length, and its shape in words."""
        tokens = torch.zeros(self.batch_size, self._max_length, dtype=torch.int64)
        labels = torch.zeros(self.batch_size, dtype=torch.int64)
        text = f"{self.batch_size} examples of {self._max_length} tokens"
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}, text

    def _load(self) -> Parts:
        training, development = glue.load(self.dataset, self._data_dir)
        rows, held_out = self._divide(training.labels)
        train, test = (
            TokenisedSentences(self._encode(part), part.labels, self.tokenizer.pad_token_id, part.identity)
            for part in (training, development)
        )
        return Parts(train.subset(rows), train.subset(held_out), test)

    def _encode(self, part: glue.Sentences) -> Encoded:
        found = self.tokenizer(
            *(list(texts) for texts in part.texts),
            truncation=True,
            max_length=self._max_length,
            return_attention_mask=False,
            verbose=False,
        )
        return {name: found[name] for name in ("input_ids", "token_type_ids") if name in found}

    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        return super().describe() | {
            "classes": glue.CLASSES,
            "tokenizer": {"name": self._tokenizer_name, "vocab_size": len(self.tokenizer)},
            "max_length": self._max_length,
        }


class TokenisedSentences:
    """Token ids of all examples in one array, padded batch by batch.

    Args:
        encoded: lists of token ids, and of token types if there are any.
        labels: int64 (n,).
        pad_id: fills rows up.
        content: names what was tokenised.
    """

    def __init__(self, encoded: Encoded, labels: Indices, pad_id: int, content: str) -> None:
        lengths = np.asarray([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
        self._starts, self._lengths = np.cumsum(lengths) - lengths, lengths
        self._flat = {
            name: np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(lengths.sum()))
            for name, rows in encoded.items()
        }
        self._labels, self._pad_id, self._content = labels, pad_id, content
        self._rows = np.arange(len(labels), dtype=np.int64)

    def subset(self, rows: Indices) -> TokenisedSentences:
        """Return the examples `rows`, sharing the tokens."""
        part = object.__new__(TokenisedSentences)
        part.__dict__.update(self.__dict__, _rows=rows)
        return part

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Examples `indices`: `input_ids`, `attention_mask`, perhaps `token_type_ids` (b, longest), `labels` (b,)."""
        rows = self._rows[indices]
        columns = np.arange(int(self._lengths[rows].max()))
        real = columns < self._lengths[rows][:, None]
        places = np.where(real, self._starts[rows][:, None] + columns, 0)
        batch = {
            name: torch.from_numpy(np.where(real, flat[places], self._pad_id if name == "input_ids" else 0)).long()
            for name, flat in self._flat.items()
        }
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        batch["labels"] = torch.from_numpy(self._labels[rows])
        return batch

    def identity(self) -> str:
        """Hash of tokens, labels and which examples belong here."""
        digest = hashlib.blake2b(self._content.encode(), digest_size=16)
        arrays: list[npt.NDArray[Any]] = [*self._flat.values(), self._lengths, self._rows]
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_tokenizer(name: str, data_dir: Path) -> Any:
    """Return a Hugging Face tokenizer: from a path as typed, <data_dir>/tokenizers/<name>, the HF cache or the hub.

    Raises:
        UserError: nothing of that name, offline, or files that are no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for path in (Path(name).expanduser(), data_dir / "tokenizers" / name):
        if not path.exists():
            continue
        file = path / "tokenizer.json" if path.is_dir() else path
        described = path.is_dir() and any((path / word).is_file() for word in ("config.json", "tokenizer_config.json"))
        try:
            if described:
                return _with_padding(AutoTokenizer.from_pretrained(str(path), local_files_only=True))
            return _with_padding(PreTrainedTokenizerFast(tokenizer_file=str(file)))  # type: ignore[no-untyped-call]
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).splitlines() or [""])[0][:160]
            raise UserError(f"data.tokenizer={path} is no tokenizer that transformers reads ({reason})") from error
    try:
        try:
            return _with_padding(AutoTokenizer.from_pretrained(name, local_files_only=True))
        except (OSError, ValueError):
            if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
                raise
            require_network()
            return _with_padding(AutoTokenizer.from_pretrained(name))
    except Exception as error:
        tried = f"data.tokenizer={name}: no such path, none under {data_dir / 'tokenizers'} (SUBSPACE_DATA)"
        source = f"'{name}' from the Hugging Face cache or hub"
        raise hub_error(tried, source, error, "a folder with the model's tokenizer, or a tokenizer.json") from error


def _with_padding(tokenizer: Any) -> Any:
    """A bare tokenizer.json does not say which token pads: take the usual name, else the first special token."""
    if tokenizer.pad_token_id is None:
        added = tokenizer.added_tokens_decoder
        special = [str(token) for _, token in sorted(added.items()) if token.special]
        usual = [token for token in special if "pad" in token.lower()]
        tokenizer.pad_token = (usual or special or [tokenizer.convert_ids_to_tokens(0)])[0]
    return tokenizer
