"""The error of a store's forecast on the last weeks of its sales, which no forecast is trained on.

Shapes: U weeks, P products of the store's table, W figures for each product.
"""

from collections.abc import Mapping

import numpy as np
import torch

from fedshelf.core.sales_columns import HAS
from fedshelf.data.sales_features import SalesHistory
from fedshelf.models.sales import SalesLinear
from fedshelf.training.bound_model import BoundModel

MODEL = "model"


def forecast_errors(bound: BoundModel, history: SalesHistory) -> Mapping[str, float]:
    """The weighted absolute percentage error (WAPE) of the model's forecast, and of forecasts without a model.

    It is the sum of absolute errors over weeks and products, divided by the units sold: 0 is perfect. Products without
    sales data before a week are left out.

    Args:
        bound: the model, with a sales tower.
        history: the store's sales.

    Returns:
        By method: `model`, and those of `SalesHistory.simple_forecasts`; empty if the table is too short.
    """
    days_U, layer = history.held_out_weeks(), bound.trained
    if not len(days_U) or not isinstance(layer, SalesLinear):
        return {}
    rows_UPW = history.rows(days_U)
    forecasts = history.simple_forecasts(days_U)
    units_UP, known_UP = forecasts.pop("units"), rows_UPW[:, :, HAS] > 0
    if not units_UP[known_UP].sum():
        return {}
    with torch.inference_mode():
        given = torch.from_numpy(rows_UPW.astype(np.float32)).to(bound.compute.device)
        forecasts[MODEL] = layer.forecast(given).cpu().double().numpy()
    total = float(units_UP[known_UP].sum())
    return {name: float(np.abs(made - units_UP)[known_UP].sum()) / total for name, made in forecasts.items()}
