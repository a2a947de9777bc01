"""Registry of the upload pipeline's stages by name, besides the codec's."""

STAGES: dict[str, str] = {
    "clip": "fedshelf.privacy.clipping:Clip",
}
"""Components (`core.settings`) that make a `Stage`, each used if its first setting is set."""
