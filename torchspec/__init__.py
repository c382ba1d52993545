"""TorchSpec: disaggregated training of speculative-decoding draft models, as a Lightning project.

Importing this package stays cheap: engines, stores, loggers and torch.distributed load where they are used.
"""

__version__ = "0.1.0"
