"""Reinforcement learning in gymnasium's environments: episodes, policies, evolution strategies, deep Q-learning.

Nothing here knows Hydra or Lightning; gymnasium itself is imported when an environment is made.
"""
