"""Registries of privacy components by name: differential privacy, and the pipeline's stages besides the codec."""

PROTECTIONS: dict[str, str] = {
    "none": "fedshelf.privacy.base:NONE",
    "sample": "fedshelf.privacy.dp_sgd:SampleDP",
    "client": "fedshelf.privacy.client_dp:ClientDP",
}
"""Components (`core.settings`) that make a `Protection`."""

STAGES: dict[str, str] = {
    "clip": "fedshelf.privacy.clipping:Clip",
    "mask": "fedshelf.privacy.secure_aggregation.settings:Mask",
    "encryption": "fedshelf.privacy.homomorphic.settings:Encryption",
}
"""Components that make a `Stage`, each used if its first setting is set and the chosen protection does not use it."""
