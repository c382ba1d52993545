"""The made-up family ``linear``: a norm and a linear head on one auxiliary hidden state propose one draft token."""
