"""Models of a user's own, for tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESNET10 = "ownnet.small:make"
ARGUMENTS = ("--model", RESNET10, "--model-path")
VIT = "ownvit:make"


def write_resnet10(folder: Path, *, width: int = 8) -> Path:
    """Write a module that makes FedShelf's `resnet10`, with its width in another file; returns `folder`."""
    package = folder / "ownnet"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "widths.py").write_text(f"WIDTH = {width}\n")
    (package / "small.py").write_text(
        "from fedshelf.models.resnet import resnet10\nfrom ownnet.widths import WIDTH\n\n\n"
        "def make(num_classes):\n    return resnet10(num_classes, width=WIDTH)\n"
    )
    return folder


def write_vit(folder: Path) -> Path:
    """Write a module that makes a vision transformer of one block, for photos of 16 pixels; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ownvit.py").write_text(
        "from fedshelf.models.timm_models import import_timm\n\n\n"
        "def make(num_classes):\n"
        "    return import_timm().models.vision_transformer.VisionTransformer(\n"
        "        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=num_classes)\n"
    )
    return folder


@contextmanager
def forgotten_imports(folder: Path) -> Iterator[None]:
    """Undo, after this context, imports from `folder` and changes of the path."""
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
