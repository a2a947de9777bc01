"""A server and a store may have different processors, and must mean the same by the same bytes."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import hashlib, sys, torch
from fedshelf.compression.chain import decode, parse

torch.set_num_threads(1)
for text in ("fp16", "bf16", "int8", "int4", "drive", "modular:16:1.0", "topk:0.1+drive", "randk:0.1+int4"):
    for size in (1000, 70_001):
        vector = ((torch.arange(size) * 7919 % 65_537) - 32_768) / 2**20  # exact: what torch draws may differ
        encoded = parse(text).encode(vector, seed=5)
        for _, values in [*sorted(encoded.parts.items()), ("", decode(encoded))]:
            print(hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
print(torch.backends.cpu.get_cpu_capability(), file=sys.stderr)
"""


def encoded_and_decoded(variables: Mapping[str, str]) -> tuple[str, str]:
    """In an environment of these variables: digests of what a process encodes and decodes, and how torch computes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
    ended = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return ended.stdout, ended.stderr.strip()


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the variables hold libraries to x86-64's oldest instructions"
)
def test_every_processor_writes_and_reads_the_same_bits() -> None:
    features = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    old, how = encoded_and_decoded(
        {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    )  # fmt: skip
    assert how == "DEFAULT", "the variable has no effect, and nothing is compared"
    assert (old, len(old.splitlines())) == (encoded_and_decoded({})[0], 52)
