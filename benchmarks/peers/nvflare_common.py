"""What all jobs on NVIDIA FLARE share."""

# mypy: disable-error-code="import-not-found"

from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

CHECK_SECONDS = 0.02  # its defaults of 0.5 s (controller) and 2 s (clients) would be waited for in every round
SERVER_CONFIG = {"server": {"task_request_interval": CHECK_SECONDS}}


def site_number(fl_ctx: Any) -> int:
    """0 for site-1."""
    return int(fl_ctx.get_identity_name().removeprefix("site-")) - 1


def reply(model: FLModel) -> Any:
    """The answer of an Executor; all weigh the same, as all stores hold as many photos."""
    model.meta = {"NUM_STEPS_CURRENT_ROUND": 1}
    return FLModelUtils.to_shareable(model)
