"""Processes of tests without the seconds of their imports.

Most tests of a whole run spend their seconds on importing torch, Lightning and Transformers in each of its processes. Here a process that has imported them
waits beside every process that may start one, and forks: :func:`install` takes the place of the part of ``subprocess.Popen`` that forks and executes, for
commands that start TorchSpec (``main.py``, ``-m torchspec...``, ``-m tests...``). The new process is a child of the one that asked for it, with the arguments,
directory, environment, files, session and limits that were asked for, also as /proc shows them: what a fresh interpreter would be, but for the imports.

Whatever cannot be carried over starts cold, as does every process of a test that is marked ``cold_start``, and all on a machine with a GPU.
"""

from tests.forks.client import cold, install

__all__ = ["cold", "install"]
