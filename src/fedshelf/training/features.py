"""Features of photos: what a frozen backbone makes of them, computed once and then trained on instead of the photos.

View 0 of a photo is the photo as it is evaluated; the others are random views, which depend on the photo's pixels and
the number of the view alone. Batches have one size, the last filled up with black photos, so that the features of a
photo do not depend on the others.

Shapes: N photos, V views, D features, B batch.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedshelf.core.rng import Rng
from fedshelf.core.text import counted
from fedshelf.data.augmentation import augment, normalize
from fedshelf.data.feature_cache import FeatureCache
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.head import linear_head
from fedshelf.training.bound_model import BoundModel

logger = logging.getLogger(__name__)
FEATURES_VERSION = 1
BATCH = 16
LONG = 500  # features to compute, from which on it is logged

Progress = Callable[[int, int], None]


def featurized(bound: BoundModel, photos: PhotoSet, *, cache: Path | None, views: int = 1) -> PhotoSet:
    """The features of photos, in their place.

    Args:
        bound: the model, with its frozen values loaded.
        photos: the photos.
        cache: folder in which features are kept; None keeps none.
        views: V.

    Returns:
        float32 [N, V, D] and the labels; `photos` itself if these are features already.

    Raises:
        ModelError: the model's last step is not its output layer.
    """
    if photos.images.ndim == 3:
        return photos
    kept = None if cache is None else FeatureCache(path=cache / f"{_backbone(bound, photos.images.shape[1])}.sqlite")
    wanted = list(itertools.product(range(len(photos)), range(views)))
    digests = [hashlib.sha256(image.tobytes()).digest() for image in photos.images]
    keys = [digests[photo] + bytes([view]) for photo, view in wanted]
    known = kept.find(keys) if kept else {}
    missing = {key: place for key, place in zip(keys, wanted, strict=True) if key not in known}
    if len(missing) >= LONG:
        logger.info("computing the features of %s once", counted(len(missing) // views, "photo"))
    for some in _blocks(list(missing.items())):
        made = _compute(bound, photos, [place for _, place in some])
        computed = {key: features for (key, _), features in zip(some, made, strict=True)}
        known |= computed
        if kept:
            kept.add(computed)
    num_features = linear_head(bound.module)[1].in_features
    features = np.empty((len(keys), num_features), np.float32)
    for row, key in enumerate(keys):
        features[row] = known[key]
    return PhotoSet(features.reshape(len(photos), views, num_features), photos.labels)


def _blocks(
    missing: list[tuple[bytes, tuple[int, int]]], size: int = 16 * BATCH
) -> Iterator[list[tuple[bytes, tuple[int, int]]]]:
    yield from (missing[start : start + size] for start in range(0, len(missing), size))


def _compute(bound: BoundModel, photos: PhotoSet, places: list[tuple[int, int]]) -> NDArray[np.float32]:
    """The features [len(places), D] of (photo, view) pairs."""
    found = []
    for start in range(0, len(places), BATCH):
        some = places[start : start + BATCH]
        inputs = torch.cat([_view(bound, photos.images[photo], view) for photo, view in some])
        batch = torch.zeros(BATCH, *inputs.shape[1:], device=inputs.device).contiguous(
            memory_format=torch.channels_last
        )
        batch[: len(some)] = inputs
        found.append(bound.features(batch)[: len(some)].cpu().numpy())
    return np.concatenate(found)


def _view(bound: BoundModel, image_HWC: NDArray[np.uint8], view: int) -> torch.Tensor:
    """One view of a photo, normalized [1, 3, H, W]."""
    mean, std, device = bound.normalization.mean, bound.normalization.std, bound.compute.device
    image_BHWC = torch.from_numpy(image_HWC[None].copy())
    if view == 0 or bound.settings.augmentation is None:
        return normalize(image_BHWC, device=device, mean=mean, std=std)
    seed = int.from_bytes(hashlib.sha256(image_HWC.tobytes()).digest()[:7], "big")
    generator = Rng(seed).fork(purpose=f"view-{view}").torch()
    return augment(
        image_BHWC, settings=bound.settings.augmentation, generator=generator, device=device, mean=mean, std=std
    )  # fmt: skip


def _backbone(bound: BoundModel, image_size: int) -> str:
    """A digest of all that features depend on besides the photo and the number of the view."""
    from fedshelf.serialization import blob

    head = f"{bound.output_layer}."
    tensors = {name: view for name, view in bound.params.views().items() if not name.startswith(head)}
    layout = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    kind = f"{type(bound.module).__qualname__} {bound.compute.device.type}"
    values = blob.write({name: tensors[name].reshape(-1) for name in sorted(tensors)}).digest
    text = (
        f"{FEATURES_VERSION} {image_size} {bound.normalization} {bound.settings.augmentation} {kind} {layout} {values}"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:40]
