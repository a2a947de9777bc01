"""Settings and helpers of all jobs on NVIDIA FLARE."""

# mypy: disable-error-code="import-not-found"

from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

CHECK_SECONDS = 0.02  # the defaults of 0.5 s (controller) and 2 s (clients) would delay every round
SERVER_CONFIG = {"server": {"task_request_interval": CHECK_SECONDS}}


def site_number(fl_ctx: Any) -> int:
    """Return the number of a site, from 0."""
    return int(fl_ctx.get_identity_name().removeprefix("site-")) - 1


def reply(model: FLModel) -> Any:
    """Return the reply of an Executor; all have the same weight, since all stores hold as many photos."""
    model.meta = {"NUM_STEPS_CURRENT_ROUND": 1}
    return FLModelUtils.to_shareable(model)
