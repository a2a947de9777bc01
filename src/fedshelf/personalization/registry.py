"""Ways of personalization by name."""

from collections.abc import Callable, Mapping
from typing import Any

from fedshelf.core.choices import PersonalizeName
from fedshelf.personalization import fedbn, fedper
from fedshelf.personalization.base import NONE, Personalization, PersonalLayers
from fedshelf.personalization.ditto import Ditto
from fedshelf.personalization.fedrep import fedrep
from fedshelf.personalization.finetune import FineTuning

_MAKERS: Mapping[PersonalizeName, Callable[[Mapping[str, Any]], Personalization]] = {
    "none": lambda settings: NONE,
    "fedbn": lambda settings: PersonalLayers(names=fedbn.personal_names),
    "fedper": lambda settings: PersonalLayers(names=fedper.personal_names),
    "fedrep": lambda settings: fedrep(settings["fedrep_head_epochs"]),
    "ditto": lambda settings: Ditto(pull=settings["ditto_lambda"]),
    "finetune": lambda settings: FineTuning(epochs=settings["finetune_epochs"], client_lr=settings["finetune_lr"]),
}


def make(name: PersonalizeName, settings: Mapping[str, Any]) -> Personalization:
    """The way `name` of a run's settings, which are named as its flags."""
    return _MAKERS[name](settings)
