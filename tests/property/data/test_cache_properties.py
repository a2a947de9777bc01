import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.data.cache import PhotoCache
from fedshelf.data.decode import UnusablePhotoError, decode
from fedshelf.data.photo_files import Photo
from tests.unit.data.samples import write_photo

names = st.sampled_from(["a.png", "b.jpg", "c.bmp", "d.webp"])
changes = st.one_of(
    st.tuples(st.just("write"), names, st.integers(0, 5)),
    st.tuples(st.just("break"), names, st.integers(0, 5)),
    st.tuples(st.just("remove"), names, st.just(0)),
    st.tuples(st.just("open"), st.permutations(["a.png", "b.jpg", "c.bmp", "d.webp"]), st.sampled_from([8, 12])),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(changes, min_size=3, max_size=12))
def test_whatever_happens_to_the_files_the_cache_shows_what_a_direct_decode_shows(  # type: ignore[no-untyped-def]
    history,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "A"
        root.mkdir()
        cache = PhotoCache(root=Path(folder) / "cache")
        for what, target, number in [*history, ("open", ["a.png", "b.jpg", "c.bmp", "d.webp"], 8)]:
            if what == "write":
                write_photo(root / target, number, 20 + number, 20)
            elif what == "break":
                (root / target).write_bytes(b"x" * number)
            elif what == "remove":
                (root / target).unlink(missing_ok=True)
            else:
                photos = [Photo(class_path="A", path=root / name) for name in target]
                cached = cache.open(photos, number, allow_empty=True)
                expected = {}
                for position, photo in enumerate(photos):
                    try:
                        expected[position] = decode(photo.path.read_bytes(), number)
                    except (OSError, UnusablePhotoError):
                        continue
                assert cached.kept == tuple(expected)
                assert len(cached.problems) == len(photos) - len(expected)
                for image, position in zip(cached.images, cached.kept, strict=True):
                    np.testing.assert_array_equal(image, expected[position])
