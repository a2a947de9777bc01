"""Choices for settings. Free of imports, so that the command line can show them quickly."""

from enum import StrEnum
from typing import Literal

AttackName = Literal["none", "label-flip", "sign-flip", "scale"]
CompileChoice = Literal["on", "off"]
AdmissionName = Literal["token", "open"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
DistillMode = Literal["federated", "central", "ensemble"]
EngineName = Literal["local", "vmap", "ray", "auto"]
LocalWork = Literal["fixed", "cut", "dynamic"]
Metric = Literal["auto", "accuracy", "central_accuracy", "train_loss"]
NormName = Literal["batch", "group"]
OptimizerName = Literal["sgd", "adamw"]
WeightsName = Literal["examples", "equal"]
SamplingName = Literal["uniform", "size", "availability"]
Schedule = Literal["constant", "cosine"]
TrainName = Literal["all", "head", "norm", "adapter", "sales"]
WarmStart = Literal["none", "ridge"]
WorkNorm = Literal["none", "l2", "l1"]


class Candidate(StrEnum):
    """The models that a store chooses among.

    Attributes:
        LOCAL: trained on the store's own photos only.
        GLOBAL: the federated model.
        PERSONALIZED: the federated model adapted to the store.
    """

    LOCAL = "local"
    GLOBAL = "global"
    PERSONALIZED = "personalized"
