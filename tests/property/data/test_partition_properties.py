import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fedshelf.data.partition import Mode, deal, write_stores
from tests.examples import examples


@settings(max_examples=examples(40), deadline=None)
@given(
    counts=st.lists(st.integers(min_value=6, max_value=20), min_size=3, max_size=5),
    mode=st.sampled_from([Mode.IID, Mode.DIRICHLET, Mode.ASSORTMENT]),
    num_stores=st.integers(min_value=1, max_value=3),
    alpha=st.floats(min_value=0.5, max_value=100),
    seed=st.integers(min_value=0, max_value=2**31),
)
def test_every_photo_goes_to_exactly_one_store(  # type: ignore[no-untyped-def]
    counts, mode, num_stores, alpha, seed
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pack, out = Path(folder) / "pack", Path(folder) / "out"
        expected = []
        for label, count in enumerate(counts):
            (pack / f"class-{label}").mkdir(parents=True)
            for number in range(count):
                (pack / f"class-{label}" / f"{number}.jpg").touch()
                expected.append(f"class-{label}/{number}.jpg")
        partition = deal(pack, mode=mode, num_stores=num_stores, alpha=alpha, seed=seed)
        assert sorted(photo for members in partition.stores.values() for photo in members) == sorted(expected)
        assert len(partition.stores) == num_stores
        write_stores(partition, pack, out)
        written = [path.relative_to(out).as_posix().partition("/")[2] for path in out.rglob("*.jpg")]
        assert sorted(written) == sorted(expected)
