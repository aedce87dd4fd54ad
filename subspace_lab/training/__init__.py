"""The training loop: everything that knows Lightning lives in this folder."""
