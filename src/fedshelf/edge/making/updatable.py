"""What an exact head needs to learn at the till, read from its run's last state."""

import numpy as np
import torch

from fedshelf.algorithms.ridge import GRAM, Head, Ridge, Solution
from fedshelf.app.predictor import Predictor
from fedshelf.core.errors import ModelError, UsageError
from fedshelf.edge.model_info import ModelInfo
from fedshelf.edge.serving.local_head import ExactHead
from fedshelf.models.head import linear_head
from fedshelf.storage.checkpoints import FileCheckpoints
from fedshelf.storage.model_files import load_model_files
from fedshelf.storage.run_directory import RunDirectory, differences, is_run


def solution_of(predictor: Predictor) -> Solution:
    """The solution that a run's model has as its output layer.

    Args:
        predictor: the model, loaded from its run.

    Returns:
        The solution, with the inverse of the run's damped second moments.

    Raises:
        UsageError: the model is not that of a run with `--algorithm ridge` and without noise.
        ModelError: the run's state is not that of this model.
    """
    run = next((above for above in predictor.folder.absolute().parents[:2] if is_run(above)), None)
    if run is None:
        raise UsageError(f"--updatable: '{predictor.folder}' is not in its run's folder, which has the sums it needs")
    directory = RunDirectory.open(run)
    settings = {found.key: found.new for found in differences("", directory.config_toml)}
    if settings.get("algorithm") != "ridge":
        raise UsageError("--updatable: only the output layer of a run with --algorithm ridge is a closed form")
    if settings.get("dp", "none") != "none":
        raise UsageError("--updatable: this run's sums have noise (--dp), and single photos cannot be added to them")
    card = load_model_files(predictor.folder)[2]
    if "store" in card:
        raise UsageError("--updatable: this is the model of one store, and the run's sums are those of the global one")
    state = FileCheckpoints(directory.checkpoints).load_round(card["round"])
    if state is None or GRAM not in state.model.optimizer:
        raise ModelError(f"the state after round {card['round']} is not in '{directory.checkpoints}': export another")
    _, layer = linear_head(predictor.module)
    head = Head(weight=0, bias=0, num_classes=layer.out_features, num_features=layer.in_features)
    solution = Ridge(head=head).extensible_solution(state.model)
    rounded_EK = (solution.weights / solution.temperature).float()
    if layer.bias is None or not torch.equal(rounded_EK, torch.cat([layer.weight.T, layer.bias[None]])):
        raise ModelError(f"the sums in '{directory.checkpoints}' are not those of the model in '{predictor.folder}'")
    return solution


def head_of(solution: Solution, info: ModelInfo) -> ExactHead:
    """The head of a model file.

    Args:
        solution: see `solution_of`.
        info: the file's metadata.
    """
    return ExactHead(
        model=info.digest, weights=np.ascontiguousarray(solution.weights.numpy()),
        inverse=np.ascontiguousarray(solution.inverse.numpy()), temperature=solution.temperature,
    )  # fmt: skip
