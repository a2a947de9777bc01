"""How much memory is free: on the machine, and in the container."""

from pathlib import Path

import psutil
import pytest

from fedshelf.training.resources import free_memory

MIB = 1 << 20


def free(root: Path, files: dict[str, str], own_group: str) -> int:
    (root / "own_group").write_text(own_group)
    for name, text in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return free_memory(groups=root / "groups", own_group=root / "own_group")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b/memory.max": "30"}, 21),  # 10 are taken, of which 1 by what files are cached in
        ({"a/b/memory.max": "max", "a/memory.max": "25"}, 16),
        ({"a/b/memory.max": "20", "a/memory.max": "15"}, 6),
        ({"a/b/memory.max": "5"}, 0),
    ],
)
def test_a_container_leaves_what_it_or_one_around_it_allows(
    tmp_path: Path, limits: dict[str, str], expected: int
) -> None:
    files = {name: text if text == "max" else str(int(text) * MIB) for name, text in limits.items()}
    for folder in ("a", "a/b"):
        files[f"{folder}/memory.current"] = str(10 * MIB)
        files[f"{folder}/memory.stat"] = f"anon 1\ninactive_file {MIB // 2}\nactive_file {MIB // 2}\nshmem 7"
    assert free(tmp_path, files, "0::/a/b\n") == expected * MIB


def test_a_container_of_the_older_kind_counts_too(tmp_path: Path) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": str(30 * MIB),
        "memory/a/memory.usage_in_bytes": str(10 * MIB),
        "memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {MIB}\ntotal_active_file 0",
    }
    assert free(tmp_path, files, "3:cpu,cpuacct:/a\n4:memory:/a\n") == 21 * MIB


@pytest.mark.parametrize("files", [{}, {"memory.max": "nonsense"}, {"memory.max": "1000000"}])
def test_without_a_whole_answer_the_machine_s_own_memory_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert free(tmp_path, files, "0::/\n") > 100 * MIB
    assert free_memory() <= psutil.virtual_memory().total
