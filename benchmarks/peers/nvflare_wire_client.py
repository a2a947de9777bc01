"""The client's side of *wire* on NVIDIA FLARE."""

# mypy: disable-error-code="import-not-found,misc"

from typing import Any

from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from benchmarks.peers.nvflare_common import reply, site_number
from benchmarks.wire_limit import change


class AddingExecutor(Executor):
    """Returns the changed model in every round."""

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Add the round's change to the model."""
        model = FLModelUtils.from_shareable(shareable)
        added = change(site_number(fl_ctx), model.current_round + 1)
        return reply(FLModel(params={"model": model.params["model"] + added}))
