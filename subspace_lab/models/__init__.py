"""Thin factories over the model libraries."""
