"""Callbacks of Lightning, to be named in a configuration; docs/callbacks.md lists them."""
