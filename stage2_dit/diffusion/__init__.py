"""Diffusion processes behind one protocol: what is corrupted in training, and each step's mean and deviation."""
