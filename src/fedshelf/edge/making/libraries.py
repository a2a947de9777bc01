"""Optional libraries, imported when they are needed."""

import importlib
from typing import Any

from fedshelf.core.errors import UsageError

_PACKAGES = {
    "export": "the packages onnx and onnxscript",
    "edge": "the package onnxruntime",
}


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: its full name.
        extra: the extra that installs it, `export` or `edge`.

    Returns:
        The module.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"this command needs {_PACKAGES[extra]}: pip install 'fedshelf[{extra}]' ({error})") from None
