"""Federated learning: what clients do, what a server does with their answers, and who carries them between the two."""
