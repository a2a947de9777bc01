"""Registry of FedShelf's own models by name; all other names are timm's."""

MODELS: dict[str, str] = {
    "resnet10": "fedshelf.models.resnet:make_resnet10",
}
"""Functions (`core.settings.load`) that make a module from `ModelSettings`; imported only to build one."""
