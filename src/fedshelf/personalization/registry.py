"""Registry of personalization methods by name."""

PERSONALIZATIONS: dict[str, str] = {
    "none": "fedshelf.personalization.base:NONE",
    "fedbn": "fedshelf.personalization.fedbn:FEDBN",
    "fedper": "fedshelf.personalization.fedper:FEDPER",
    "fedrep": "fedshelf.personalization.fedrep:fedrep",
    "ditto": "fedshelf.personalization.ditto:Ditto",
    "gate": "fedshelf.personalization.sales_gate:SALES_GATE",
    "finetune": "fedshelf.personalization.finetune:FineTuning",
}
"""Components (`core.settings`) that make a `Personalization`."""
