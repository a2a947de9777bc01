"""The columns of a photo's sales: one row of figures for each product, at the photo's store and date.

`data.sales_features` fills them, and `models.sales` reads them. A photo without sales has zeros everywhere.

    features    what a store knows before the photo's day (`FEATURES`)
    HAS         1 if the product has sales data there, otherwise 0
    MIX         log of the product's share among the store's training photos, times the number of products
    BASE        log of the units that the 4-week mean forecasts for 7 days from the photo's day on
    TARGET      units sold on these 7 days; used in training only, as what is forecast
    KNOWN       1 if the target is known and not held out, otherwise 0
"""

FEATURES = (
    "units_1",
    "units_7",
    "units_28",
    "level",
    "price",
    "promotion",
    "promotions_ahead",
    "promotions_28",
    "weekday_sin",
    "weekday_cos",
    "season_sin",
    "season_cos",
    "days_since_sale",
)
"""Names of the features, in order (`data.sales_features`)."""

HAS, MIX, BASE, TARGET, KNOWN = range(len(FEATURES), len(FEATURES) + 5)
WIDTH = len(FEATURES) + 5
"""Figures for each product."""

HORIZON = 7
"""Days that are forecast."""
