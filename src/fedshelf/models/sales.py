"""Sales as a second input of a model: what a store sold before the day of a photo says what the photo may show.

     1  z <- image model's logits                                    [B, K]
     2  x_k <- features of product k at the store and day            [B, K, F]
     3  h_k <- relu(W_1 x_k + b_1)
     4  (bias_k, rate_k) <- W_2 h_k + W_3 x_k + b_2                  the same network for all products
     5  z_k <- z_k + g_0 · mix_k + g_1 · mask_k · bias_k
     6  ln(forecast of the units of 7 days) <- base_k + rate_k

mix is the store's share of each product among its training photos, mask_k is 1 where product k has sales data at the
store, base_k is the 4-week mean (`core.sales_columns`). The gate g starts at 1 and stays at the store
(`--personalize gate`). W_2, W_3 and b_2 start at zero, so that training starts from the image model with the store's
mix. Photos without sales have the image model's logits, bit for bit.

Recognition and forecast are trained together. The loss of a step is the sum of three:

     7  cross-entropy of line 5, in which g, mix, mask and bias are constants: it trains the image model
     8  cross-entropy of g_0 · mix + g_1 · mask · bias, without the image
     9  forecast_weight · sum |forecast - units| / sum units, over products of the batch whose units are known

By Bayes' rule, logits are a log likelihood of the photo and a log probability of each product before the photo is seen.
Line 8 makes the second of them, from sales alone. If line 7 trained it, too, it would learn from photos that the image
model knows by heart: on these, sales have nothing to add, and the gates of real photos turned negative. Line 9 is the
error that forecasts are judged by (WAPE): the likelihood of a negative binomial distribution, whose mean is forecast,
is 20 % worse by it where products are unlisted at times.

The output layer becomes a layer with these parameters of its own. Its input [B, D + K · W] are a photo's features and
behind them the figures of its sales; with D alone, it is the image model's output layer.

Shapes: B batch, K classes, D features of a photo, F features of a product, W figures of a product, H hidden units.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedshelf.core.errors import ModelError
from fedshelf.core.sales_columns import BASE, FEATURES, HAS, KNOWN, MIX, TARGET, WIDTH

HIDDEN = 16
MAX_LOG_UNITS = 16.0  # of a forecast: nine million
_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear)  # not their subclasses, which may compute something else


class SalesOutput(NamedTuple):
    """The output of a model with sales in training.

    Attributes:
        logits: of line 5 [B, K], in which sales are constants.
        prior: what sales add to the logits [B, K]; zeros for photos without sales.
        forecast_loss: line 9.
    """

    logits: Tensor
    prior: Tensor
    forecast_loss: Tensor

    def added_loss(self, labels_B: Tensor) -> Tensor:
        """Lines 8 and 9, for photos of these classes."""
        has_sales_B = (self.prior != 0).any(1)
        losses_B = F.cross_entropy(self.prior, labels_B, reduction="none")
        return (losses_B * has_sales_B).mean() + self.forecast_loss


class SalesTower(nn.Module):
    """The network of lines 3 and 4, and a store's gate. Its tensors are no layers, so that none is taken for a head.

    Args:
        generator: draws W_1.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(len(FEATURES))
        self.w_1 = nn.Parameter(torch.empty(HIDDEN, len(FEATURES)).uniform_(-bound, bound, generator=generator))
        self.b_1 = nn.Parameter(torch.zeros(HIDDEN))
        self.w_2 = nn.Parameter(torch.zeros(2, HIDDEN))
        self.w_3 = nn.Parameter(torch.zeros(2, len(FEATURES)))
        self.b_2 = nn.Parameter(torch.zeros(2))
        self.gate = nn.Parameter(torch.ones(2))

    def forward(self, features_BKF: Tensor) -> tuple[Tensor, Tensor]:
        """bias and rate, each [B, K]."""
        hidden = F.linear(features_BKF, self.w_1, self.b_1).relu()  # line 3
        output = F.linear(hidden, self.w_2, self.b_2) + F.linear(features_BKF, self.w_3)  # line 4
        return output[..., 0], output[..., 1]


class SalesLinear(nn.Linear):
    """An output layer with a sales tower.

    Attributes:
        tower: the tower.
        forecast_weight: factor of the forecast's loss.
    """

    tower: SalesTower
    forecast_weight: float

    @property
    def num_inputs(self) -> int:
        """D + K · W."""
        return self.in_features + self.out_features * WIDTH

    def forward(self, input: Tensor) -> Tensor | SalesOutput:  # type: ignore[override]
        """Compute logits [B, K].

        Args:
            input: features of photos [B, D], or these and the figures of their sales [B, D + K · W].

        Returns:
            The logits; in training with sales, also what the added losses are made of.
        """
        logits_BK = F.linear(input[:, : self.in_features], self.weight, self.bias)  # line 1
        if input.shape[1] == self.in_features:
            return logits_BK
        sales_BKW = self.sales_of(input)
        bias_BK, rate_BK = self.tower(sales_BKW[..., : len(FEATURES)])
        mask_BK, gate = sales_BKW[..., HAS], self.tower.gate
        prior_BK = gate[0] * sales_BKW[..., MIX] + gate[1] * mask_BK * bias_BK
        has_sales_B1 = (mask_BK > 0).any(1, keepdim=True)
        with_sales_BK = torch.where(has_sales_B1, logits_BK + prior_BK.detach(), logits_BK)  # line 5
        if not self.training:
            return with_sales_BK
        return SalesOutput(
            logits=with_sales_BK, prior=torch.where(has_sales_B1, prior_BK, 0.0),
            forecast_loss=self.forecast_weight * _forecast_loss(sales_BKW, rate_BK),
        )  # fmt: skip

    def sales_of(self, input: Tensor) -> Tensor:
        """The figures [B, K, W] of the sales in an input."""
        return input[:, self.in_features :].view(-1, self.out_features, WIDTH)

    def forecast(self, sales_BKW: Tensor) -> Tensor:
        """Forecast the units [B, K] of 7 days; 0 for products without sales data."""
        _, rate_BK = self.tower(sales_BKW[..., : len(FEATURES)])
        return _units(sales_BKW, rate_BK) * sales_BKW[..., HAS]


def _units(sales_BKW: Tensor, rate_BK: Tensor) -> Tensor:
    """Line 6."""
    return torch.exp((sales_BKW[..., BASE] + rate_BK).clamp(max=MAX_LOG_UNITS))


def _forecast_loss(sales_BKW: Tensor, rate_BK: Tensor) -> Tensor:
    """Line 9 without its weight; 0 if no units are known."""
    units, known = sales_BKW[..., TARGET], sales_BKW[..., KNOWN]
    errors = (_units(sales_BKW, rate_BK) - units).abs() * known
    return errors.sum() / (units * known).sum().clamp(min=1)


def add_sales(module: nn.Module, *, forecast_weight: float = 0.0, seed: int = 0) -> None:
    """Give a model's output layer a sales tower.

    Args:
        module: the model, changed in place; all tensors keep their names.
        forecast_weight: factor of the forecast's loss.
        seed: seed of the tower.

    Raises:
        ModelError: the model has no single linear output layer.
    """
    from fedshelf.models.head import linear_head

    name, layer = linear_head(module)
    if type(layer) not in _TYPES:
        raise ModelError(f"--sales needs a linear output layer, and {name} is a {type(layer).__name__}")
    layer.__class__ = SalesLinear  # keeps tensors and hooks, as in `models.adapters`
    extended = cast(SalesLinear, layer)
    extended.tower = SalesTower(torch.Generator().manual_seed(seed))
    extended.forecast_weight = forecast_weight


def tower_names(module: nn.Module) -> frozenset[str]:
    """Names of the tensors of a model's sales tower; none if it has none."""
    return frozenset(
        f"{name}.{tensor}"
        for name, child in module.named_modules()
        if isinstance(child, SalesTower)
        for tensor, _ in child.named_parameters()
    )


def gate_names(module: nn.Module) -> frozenset[str]:
    """Names of the gates, which stay at the stores; none if the model has no sales tower."""
    return frozenset(name for name in tower_names(module) if name.endswith(".gate"))
