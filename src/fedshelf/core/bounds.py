"""Bounds on the fields of messages, declared beside them and checked on receipt (`serialization.messages`).

Types are strict: a number is not a text, and a truth value is not a number. Counts are so small that the sum over any
cohort fits in 64 bits, which is what SQLite holds, and floats are finite and so small that their sums are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The strict type of the annotated field, and its bounds, as pydantic's schemas name them.

    Attributes:
        ge: inclusive lower bound of a number.
        le: inclusive upper bound of a number.
        max_length: characters of a text, or items of a tuple.
    """

    ge: float | None = None
    le: float | None = None
    max_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        schema = handler(source)
        schema.update(
            {name: value for name in ("ge", "le", "max_length") if (value := getattr(self, name)) is not None}
        )
        if schema["type"] in ("int", "float", "str", "bool"):
            schema["strict"] = True
        if schema["type"] == "float":
            schema["allow_inf_nan"] = False
        return schema


MAX_COUNT = 10**12  # photos or steps: far more than any store has
MAX_ROUND = 2**31 - 1
MAX_FLOAT = 1e12

Count: TypeAlias = Annotated[int, Bounds(ge=0, le=MAX_COUNT)]
RoundNumber: TypeAlias = Annotated[int, Bounds(ge=0, le=MAX_ROUND)]
FiniteFloat: TypeAlias = Annotated[float, Bounds(ge=-MAX_FLOAT, le=MAX_FLOAT)]
NonNegativeFloat: TypeAlias = Annotated[float, Bounds(ge=0, le=MAX_FLOAT)]
StrictBool: TypeAlias = Annotated[bool, Bounds()]
Identifier: TypeAlias = Annotated[str, Bounds(max_length=1000)]
"""A name, an identifier or a digest."""
PathText: TypeAlias = Annotated[str, Bounds(max_length=32 * 1024)]
"""A path of folders, separated by '/'."""
Text: TypeAlias = Annotated[str, Bounds()]
"""A text that the header's size alone bounds."""
