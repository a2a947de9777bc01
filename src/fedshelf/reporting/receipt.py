"""What a receipt states of a round: who took part, how updates were protected, and what was made of them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedshelf.core.errors import UsageError
from fedshelf.core.events import ClientStatus, NoiseReported, RoundFinished, RoundVoid
from fedshelf.privacy.base import DEFAULT_DELTA
from fedshelf.reporting.privacy_report import privacy_report

UNPROTECTED = (
    "when each store took part, and how long it took",
    "the size of its messages",
    "that it took part at all",
    "what the models may have memorized of photos",
)
"""What no protection of updates covers."""
_PLAIN = "each update, which the server saw as it was"
_BODY = "each update of the layers before the output layer, which the server saw as it was"
_SUM = "what the sum of the updates reveals of a store or a photo"


def protections_of(settings: Mapping[str, Any]) -> list[str]:
    """How the updates of a run are protected before they leave a store, and its model.

    Args:
        settings: the run's settings by key, where they are not the defaults.
    """
    found = [f"{key} {settings[key]}" for key in ("dp", "clip-norm", "noise-at") if key in settings]
    scope = "he" if settings.get("he-scope", "model") == "model" else f"he-scope {settings['he-scope']}"
    return found + ["secagg"] * bool(settings.get("secagg")) + [scope] * bool(settings.get("he"))


def receipt_of(
    run_id: str, round: int, rounds: Sequence[RoundFinished], *, voids: Sequence[RoundVoid],
    noise: Mapping[str, NoiseReported], settings: Mapping[str, Any], config_toml: str, model: str,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a receipt.

    Args:
        run_id: the run.
        round: the round's number.
        rounds: the run's finished rounds.
        voids: its void attempts.
        noise: the noise of each client's releases, and that of the server's under "".
        settings: the run's settings by key, where they are not the defaults.
        config_toml: the run's configuration.
        model: digest of the model after it.

    Raises:
        UsageError: the round has not finished, or `dp-accounting` is not installed and the run has noise.
    """
    record = next((one for one in rounds if one.round == round), None)
    if record is None:
        raise UsageError(f"round {round} of run {run_id} has not finished: the run has none of that number")
    until = [one for one in rounds if one.round <= round], [one for one in voids if one.round <= round]
    delta = float(settings.get("delta", DEFAULT_DELTA))
    report = privacy_report(noise, *until, delta=delta) if noise else None
    protections = protections_of(settings)
    return {
        "run": run_id,
        "round": round,
        "attempt": record.attempt,
        "cohort": [{"store": member.client, "part": member.status.value} for member in record.clients],
        "counted": sum(member.status is ClientStatus.COUNTED for member in record.clients),
        "protections": protections,
        "privacy": finite(report.to_record()) if report else None,
        "unprotected": unprotected_by(protections),
        "model": model,
        "config": hashlib.sha256(config_toml.encode()).hexdigest(),
    }


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unprotected_by(protections: Sequence[str]) -> list[str]:
    """What protections, as `protections_of` names them, do not cover."""
    if "dp sample" in protections or "noise-at stores" in protections:
        return list(UNPROTECTED)
    first = [_SUM] if {"secagg", "he", "he-scope head"} & {*protections} else [_PLAIN]
    return [_BODY] * ("he-scope head" in protections) + first + list(UNPROTECTED)
