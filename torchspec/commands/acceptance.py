"""``main.py acceptance``: see ``torchspec/acceptance.py``, which training runs as well when it has ended."""

from __future__ import annotations

from torchspec.acceptance import acceptance as acceptance
