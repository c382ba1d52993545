"""Causal attention over a pack with a few later keys a row: the step functions, and the kernels under them."""
