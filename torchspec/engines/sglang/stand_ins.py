"""Empty stand-ins for two packages that SGLang imports on a CPU and does not use there.

``sgl_kernel`` has no CPU build among the released packages; ``torchvision``'s released build does not load beside a CPU build of torch. SGLang's model
files import names of both at their top, and run dense and mixture-of-experts text models without calling one of them. What is called nevertheless raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

_NAMES = ("sgl_kernel", "torchvision")


def install() -> None:
    """For this process: stand in for those of the packages that are not installed. To be called before SGLang is imported; idempotent."""
    from transformers.utils.import_utils import is_torchvision_available, is_torchvision_v2_available

    is_torchvision_available()  # Transformers looks once, and must find what is true
    is_torchvision_v2_available()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last to be asked: only for what is not there


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top not in _NAMES or (name != top and not isinstance(sys.modules.get(top), _Module)):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Module(ModuleType):
    """Has every name but those that Python itself asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (_Absent,), {"__module__": self.__name__})


class _Names(type):
    """The class of names: each has every name in turn."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (_Absent,), {"__module__": cls.__module__})


class _Absent(metaclass=_Names):
    """Any class, function or value of a package that is not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _absent(type(self))


def _absent(kind: type) -> NoReturn:
    raise ImportError(f"{kind.__module__}.{kind.__name__} is needed, and {kind.__module__.partition('.')[0]} is not installed")
