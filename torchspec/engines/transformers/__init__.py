"""The target run by Transformers: it captures, and it answers for ``regenerate``."""
