"""From a name to a module, and from a file to its weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedshelf.core.choices import NormName
from fedshelf.core.errors import ModelError
from fedshelf.core.suggestions import did_you_mean
from fedshelf.models.resnet import resnet10

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of photos scaled to [0, 1]; ImageNet's unless a model says otherwise."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """What to build. `width` is for our own `resnet10` alone."""

    name: str
    num_classes: int
    image_size: int
    norm: NormName = "batch"
    width: int = 16
    pretrained: bool = False


def build(settings: ModelSettings, *, seed: int) -> nn.Module:
    """The module with fresh weights drawn from `seed`; the global generators are left as they were.

    Raises:
        ModelError: see `build_timm`; pretrained weights of our own models do not exist.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.name == "resnet10":
            if settings.pretrained:
                raise ModelError("resnet10 is our own and has no pretrained weights; choose a timm model for that")
            return resnet10(settings.num_classes, width=settings.width, norm=settings.norm)
        from fedshelf.models.timm_models import build_timm

        problem = find_problem(settings.name)
        if problem is not None:
            raise ModelError(problem)
        return build_timm(
            settings.name, num_classes=settings.num_classes, image_size=settings.image_size, norm=settings.norm,
            pretrained=settings.pretrained,
        )  # fmt: skip


def find_problem(name: str) -> str | None:
    """What to say where there is no model of that name, with the nearest one; None where there is."""
    if name == "resnet10":
        return None
    from fedshelf.models.timm_models import model_names

    known = model_names()
    hint = did_you_mean(name, known) or ": use resnet10, or a model of timm such as resnet18 or mobilenetv3_small_100"
    return None if name in known else f"unknown model {name!r}{hint}"


def normalization_of(module: nn.Module) -> Normalization:
    """What the model's photos are normalized with: its own published values where it has some."""
    published = getattr(module, "pretrained_cfg", None) or {}
    if "mean" in published and "std" in published:
        return Normalization(mean=tuple(published["mean"]), std=tuple(published["std"]))
    return Normalization()


def load_weights(module: nn.Module, path: Path) -> None:
    """Load `--init PATH` (safetensors, or a torch file of plain tensors). A head for another number of classes is
    left fresh; anything else that does not fit is an error.

    Raises:
        ModelError: the file cannot be read, or its tensors do not fit the model.
    """
    given = _read(path)
    head = _head_names(module)
    expected = module.state_dict()
    fitting = {name: t for name, t in given.items() if name in expected and t.shape == expected[name].shape}
    needed = {name for name, t in expected.items() if t.is_floating_point()}
    missing = needed - fitting.keys() - head
    if missing:
        some = ", ".join(
            f"{name} {tuple(given[name].shape) if name in given else 'absent'} for {tuple(expected[name].shape)}"
            for name in sorted(missing)[:5]
        )
        raise ModelError(f"{path} does not fit the model: {len(missing)} tensors differ ({some})")
    if head - fitting.keys():
        log.info("%s has another head; ours (%s) starts fresh", path, ", ".join(sorted(head - fitting.keys())))
    module.load_state_dict(fitting, strict=False)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            loaded = safetensors.torch.load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"--init: there is no file {path}") from None
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError, ModuleNotFoundError) as error:
        raise ModelError(f"--init: {path} cannot be read as weights: {error}") from error
    except Exception as error:  # torch's restricted unpickler raises a family of its own
        raise ModelError(
            f"--init: {path} holds more than plain tensors, and such a file can run code: it is not read"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ModelError(f"--init: {path} is not a dictionary of tensors")
    return loaded


def _head_names(module: nn.Module) -> set[str]:
    """Names of the last linear layer's tensors: the classifier, whatever the model calls it."""
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not linears:
        return set()
    own = set(module.state_dict())
    return {f"{linears[-1]}.{kind}" for kind in ("weight", "bias")} & own
