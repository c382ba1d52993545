"""Target engines, the worker process, and the coordinator with its clients."""
