"""Durations as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Return a duration as 4s, 3:07 or 2:45:10."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
