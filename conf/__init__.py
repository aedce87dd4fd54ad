"""The configuration tree, shipped as the package `subspace_lab.conf` (Hydra needs this file to accept `pkg://`)."""
