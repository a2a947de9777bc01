"""Registry of codecs by name: by kind, in the order of a chain."""

SPARSIFIERS: dict[str, str] = {
    "topk": "fedshelf.compression.topk:TopK",
    "randk": "fedshelf.compression.randk:RandK",
}
QUANTIZERS: dict[str, str] = {
    "fp16": "fedshelf.compression.floats:fp16",
    "bf16": "fedshelf.compression.floats:bf16",
    "int8": "fedshelf.compression.block:int8",
    "int4": "fedshelf.compression.block:int4",
    "drive": "fedshelf.compression.drive:Drive",
    "modular": "fedshelf.compression.modular:Modular",
}
LOSSLESS: dict[str, str] = {
    "zstd": "fedshelf.compression.lossless:Zstd",
}
KINDS = {"sparsifier": SPARSIFIERS, "quantizer": QUANTIZERS, "lossless stage": LOSSLESS}
"""Components (`core.settings`) that make the stages of a chain (`compression.stage`)."""
