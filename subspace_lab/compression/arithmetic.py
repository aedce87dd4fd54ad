"""An exact arithmetic coder in integers: symbols and frequencies in, bytes out, and back from the bytes alone.

Witten, Neal & Cleary, "Arithmetic coding for data compression", CACM 30(6), 1987, with 32-bit bounds. Trailing zero
bytes are left out: the decoder reads zeros beyond the end, so the length of the coded part has to be known from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

_BITS = 32
_TOP, _HALF, _QUARTER = (1 << _BITS) - 1, 1 << (_BITS - 1), 1 << (_BITS - 2)
#: frequencies are halved before their sum passes this; far below a quarter of the coder's range, as exactness needs
_MAX_TOTAL = 1 << 24


class Frequencies:
    """How often each symbol is expected, and what is learnt from the symbols seen.

    Args:
        initial: a positive integer for each symbol; their sum at most 2^24.
        increment: added to a symbol's frequency whenever it occurs, at most 2^22; 0 keeps them as they are.
    """

    def __init__(self, initial: Sequence[int], increment: int = 0) -> None:
        if not initial or min(initial) < 1 or sum(initial) > _MAX_TOTAL:
            raise ValueError("frequencies must be positive, with a sum of at most 2^24")
        self._counts = list(initial)
        self._increment = increment
        self._ends = list(accumulate(self._counts))

    @property
    def total(self) -> int:
        """The sum of all frequencies."""
        return self._ends[-1]

    def interval(self, symbol: int) -> tuple[int, int]:
        """The symbol's part [start, end) of [0, total)."""
        return self._ends[symbol] - self._counts[symbol], self._ends[symbol]

    def symbol_at(self, position: int) -> int:
        """The symbol whose part contains a position in [0, total)."""
        low, high = 0, len(self._ends) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if position < self._ends[middle] else (middle + 1, high)
        return low

    def seen(self, symbol: int) -> None:
        """Learn from one occurrence."""
        if self._increment:
            self._counts[symbol] += self._increment
            if self.total + 2 * self._increment > _MAX_TOTAL:
                self._counts = [(count + 1) // 2 for count in self._counts]
            self._ends = list(accumulate(self._counts))


def encode(symbols: Iterable[int], frequencies: Frequencies) -> bytes:
    """Code symbols in 0 … len(frequencies) − 1; within two bits and a byte's end of their information content."""
    low, high, pending, bits = 0, _TOP, 0, list[int]()
    for symbol in symbols:
        start, end = frequencies.interval(symbol)
        low, high = _narrow(low, high, start, end, frequencies.total)
        frequencies.seen(symbol)
        while True:
            if high < _HALF or low >= _HALF:
                bit = int(low >= _HALF)
                bits += [bit, *[1 - bit] * pending]
                pending = 0
            elif low >= _QUARTER and high < _HALF + _QUARTER:
                pending += 1
                low, high = low - _QUARTER, high - _QUARTER
            else:
                break
            low, high = (low << 1) & _TOP, ((high << 1) & _TOP) | 1
    if low > 0 or pending:  # one more bit decides between the quarters; zeros follow by themselves
        bit = int(low >= _QUARTER)
        bits += [bit, *[1 - bit] * (pending + 1)]
    bits += [0] * (-len(bits) % 8)
    packed = int("".join(map(str, bits)) or "0", 2).to_bytes(len(bits) // 8, "big")
    return packed.rstrip(b"\0")


def decode(data: bytes, count: int, frequencies: Frequencies) -> list[int]:
    """Return `count` symbols from what `encode` gave; the same initial frequencies and increment are needed.

    Any bytes decode to something: damage has to be found by a checksum around this.
    """
    source = int.from_bytes(data, "big")
    length = 8 * len(data)
    value = (source << _BITS) >> length if length < _BITS else source >> (length - _BITS)
    unpacked = f"{source:0{length}b}" if length else ""
    position, low, high = _BITS, 0, _TOP
    symbols: list[int] = []
    while len(symbols) < count:
        total = frequencies.total
        symbol = frequencies.symbol_at(((value - low + 1) * total - 1) // (high - low + 1))
        symbols.append(symbol)
        low, high = _narrow(low, high, *frequencies.interval(symbol), total)
        frequencies.seen(symbol)
        while True:
            if high < _HALF:
                shift = 0
            elif low >= _HALF:
                shift = _HALF
            elif low >= _QUARTER and high < _HALF + _QUARTER:
                shift = _QUARTER
            else:
                break
            bit = int(unpacked[position]) if position < length else 0
            position += 1
            low, high, value = (low - shift) << 1, ((high - shift) << 1) | 1, ((value - shift) << 1) | bit
    return symbols


def _narrow(low: int, high: int, start: int, end: int, total: int) -> tuple[int, int]:
    width = high - low + 1
    return low + width * start // total, low + width * end // total - 1
