"""The store of the engine tests."""

from tests.engines.conftest import server

__all__ = ["server"]
