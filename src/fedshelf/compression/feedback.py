"""Error feedback: Seide et al. 2014, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs", section 3; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", algorithm 2 (EF-SGD).

    client, e_0 = 0, in each round t in which it takes part:
     1  p_t <- delta_t + e_t            compensate
     2  send C(p_t)
     3  e_{t+1} <- p_t - C(p_t)         residual

What is left out is sent later: sum_t C(p_t) + e_{T+1} = sum_t delta_t. With a contraction C (topk, randk), SGD
converges as without compression, up to higher-order terms (theorem II).

Differs from the paper: the step size is inside delta, a whole round of local steps; a client that is not asked keeps
its e. C(p_t) is what the server decodes, bit for bit; e is committed only once the server has counted the upload.
"""

from torch import Tensor

from fedshelf.core.errors import FedShelfError


def compensate(vector: Tensor, memory: Tensor | None) -> Tensor:
    """p_t [n] (line 1); `memory` is e_t [n], None before the first round."""
    if memory is None:
        return vector
    return vector + _alike(memory, vector)


def residual(compensated: Tensor, decoded: Tensor) -> Tensor:
    """e_{t+1} [n] (line 3); `decoded` is C(p_t) [n], as the receiver decodes it."""
    return compensated - _alike(decoded, compensated)


def _alike(given: Tensor, wanted: Tensor) -> Tensor:
    if given.shape != wanted.shape:  # a vector of one value would silently be added to all
        raise FedShelfError(
            f"error feedback: {given.numel():,} values remembered, {wanted.numel():,} to send. The model changed; "
            "start with an empty memory"
        )
    return given
