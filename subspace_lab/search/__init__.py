"""Searching the smallest subspace that is good enough: which runs to make, where they run, and what they say together.

`protocols/dimension_search.py` is the way in. Here `grid` and `learning_rates` choose what to try next, `cells` is one
training run and its folder, `executors` run many of them, `engine` decides and `statistics` reads the answer off the
curve.
"""
