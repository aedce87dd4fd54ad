"""Tokenizers behind one interface: bytes, `tokenizer.json`, BPE folders, sentencepiece models, hub names.

Every tokenizer has an end-of-document id (`eos_id`): the token that separates packed documents. One that
defines none gets the first free id, as bytes do (256), so packing never glues two documents together.

`vocab_size` is one more than the largest id that text can produce: T5's sentencepiece gives 32000, the size
of GaLore's LLaMA models (the 100 sentinel ids that transformers adds to T5 are not counted; text that spells
one out becomes `unk`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from subspace_lab.errors import UserError

Ids = npt.NDArray[np.uint32]

_PIECE = 1 << 18
"""Longest string, in characters, given to a tokenizer at once (cut at a line end): memory grows with it."""

_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")
_UNK_NAMES = ("<unk>", "[UNK]", "<|endoftext|>")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


class Tokenizer:
    """Text to ids and back. Subclasses set the attributes and implement `_encode` and `decode`.

    Attributes:
        name: what the user asked for.
        identity: hash of everything that decides the ids; part of the token cache's key.
        vocab_size: one more than the largest id `encode` or `eos_id` can give.
        eos_id: the document separator.
        bos_id: the token that a text begins with where a model wants one; None if there is none.
        pad_id: fills rows up; its own id where the vocabulary has one, else `eos_id` (labels are -100 there
            either way).
    """

    name: str
    identity: str
    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Tokenise each text; no special tokens are added. Returns one uint32 array per text."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = iter(self._encode([piece for group in pieces for piece in group]))
        return [np.concatenate([next(flat) for _ in group]) if group else np.empty(0, np.uint32) for group in pieces]

    def _encode(self, texts: list[str]) -> list[Ids]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; the separator and padding disappear."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0-255, and 256 between documents. Needs no file and no library."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.identity = "bytes-1"
        self.vocab_size = 257
        self.eos_id = self.pad_id = 256

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file, read by the `sentencepiece` library."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"data.tokenizer={path} is not a sentencepiece model ({error})") from error
        size = int(self._model.get_piece_size())
        self.name = str(path)
        self.identity = file_hash(path)
        self.eos_id = int(self._model.eos_id()) if self._model.eos_id() >= 0 else size
        self.pad_id = int(self._model.pad_id()) if self._model.pad_id() >= 0 else self.eos_id
        self.bos_id = int(self._model.bos_id()) if self._model.bos_id() >= 0 else None
        self.vocab_size = max(size, self.eos_id + 1)

    def _encode(self, texts: list[str]) -> list[Ids]:
        return [np.asarray(ids, dtype=np.uint32) for ids in self._model.encode(texts, out_type=int)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; the separator and padding disappear."""
        size = self._model.get_piece_size()
        return str(self._model.decode([int(i) for i in ids if i < size and i not in (self.eos_id, self.pad_id)]))


class VocabularyTokenizer(Tokenizer):
    """A vocabulary and two functions: what `tokenizers` and `transformers` objects come down to."""

    def __init__(
        self,
        name: str,
        identity: str,
        vocabulary: dict[str, int],
        specials: Sequence[str],
        encode: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
        eos: str | None = None,
        pad: str | None = None,
        bos: str | None = None,
    ) -> None:
        self.name, self.identity = name, identity
        self._encode_ids, self._decode_ids = encode, decode
        ordinary = [i for token, i in vocabulary.items() if token not in set(specials)]
        size = max(ordinary, default=-1) + 1
        eos = eos or next((token for token in _EOS_NAMES if token in vocabulary), None)
        pad = pad or next((token for token in _PAD_NAMES if token in vocabulary), None)
        self.eos_id = vocabulary.get(eos or "", size)
        self.vocab_size = max(size, self.eos_id + 1)
        self.bos_id = vocabulary.get(bos or "")
        pad_id = vocabulary.get(pad or "", self.eos_id)
        self.pad_id = pad_id if pad_id < self.vocab_size else self.eos_id
        unk = next((vocabulary[token] for token in _UNK_NAMES if token in vocabulary), self.eos_id)
        self._unk_id = unk if unk < self.vocab_size else self.eos_id

    def _encode(self, texts: list[str]) -> list[Ids]:
        result = []
        for ids in self._encode_ids(texts):
            array = np.asarray(ids, dtype=np.uint32)
            array[array >= self.vocab_size] = self._unk_id  # a sentinel spelled out in the text
            result.append(array)
        return result

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; the separator and padding disappear."""
        return self._decode_ids([int(i) for i in ids if i not in (self.eos_id, self.pad_id)])


def _pieces(text: str) -> Iterable[str]:
    while len(text) > _PIECE:
        cut = text.rfind("\n", 1, _PIECE) + 1 or _PIECE
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
