"""Names of models: FedShelf's registry, and functions of a user's own; all other names are timm's."""

import re

MODELS: dict[str, str] = {
    "resnet10": "fedshelf.models.resnet:make_resnet10",
}
"""Functions (`core.settings.load`) that make a module from `ModelSettings`; imported only to build one."""

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_OWN = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}")


def is_own(name: str) -> bool:
    """Whether a model's name stands for a user's own code (`package.module:function`)."""
    return ":" in name


def problem_with_own(name: str) -> str | None:
    """Why the name of a user's own model is invalid; None if it is not."""
    if len(name) <= 200 and _OWN.fullmatch(name):
        return None
    return f"{name[:100]!r} is not MODULE:FUNCTION, such as mymodels.small:make_model"
