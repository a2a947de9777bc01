"""The words that settings choose among; free of imports, so that the command line can show them at once."""

from enum import StrEnum
from typing import Literal

AggregatorName = Literal["mean", "median", "trimmed-mean", "multi-krum"]
AttackName = Literal["none", "label-flip", "sign-flip", "scale"]
CompileChoice = Literal["auto", "on", "off"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["local", "vmap", "ray", "auto"]
LocalWork = Literal["fixed", "cut", "dynamic"]
LossName = Literal["cross-entropy", "fedrs", "fedlc"]
Metric = Literal["auto", "accuracy", "central_accuracy", "train_loss"]
NormName = Literal["batch", "group"]
OptimizerName = Literal["sgd", "adamw"]
PersonalizeName = Literal["none", "fedbn", "fedper", "fedrep", "ditto", "finetune"]
SamplingName = Literal["uniform", "size", "availability"]
ScaffoldOption = Literal["1", "2"]
Schedule = Literal["constant", "cosine"]
WorkNorm = Literal["none", "l2", "l1"]


class Candidate(StrEnum):
    """The models that a store can choose among: trained alone, everybody's, and everybody's made its own."""

    LOCAL = "local"
    GLOBAL = "global"
    PERSONALIZED = "personalized"
