"""Sequences of tasks: how they are made, what is measured of them, and what methods may know of the task at hand."""
