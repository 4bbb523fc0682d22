"""Shapes of all families: where a recipe or a bundle says which one it is.

Needs no torch; the networks of the families are in families.py.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WrapValidator

from raptide.model.config import PRESETS, TRAITS, ModelSettings
from raptide.model.lstm.config import LSTM_PRESETS, LstmSettings

FAMILIES: dict[str, type[ModelSettings] | type[LstmSettings]] = {
    **dict.fromkeys(TRAITS, ModelSettings),
    "lstm": LstmSettings,
}

ALL_PRESETS = PRESETS | LSTM_PRESETS


def read_shape(value: Any) -> ModelSettings | LstmSettings:
    """The settings of whichever family `family`, or the family of `preset`, names; ESM-2 if none.

    Raises:
        ValueError: there is no such family or preset, or pydantic's own.
    """
    if not isinstance(value, dict):
        return value if isinstance(value, LstmSettings) else ModelSettings.model_validate(value)
    fields = dict(value)
    if "preset" in fields:
        name = fields.pop("preset")
        if name not in ALL_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(ALL_PRESETS)}, but is {name!r}")
        fields = ALL_PRESETS[name] | fields
    family = fields.get("family", "esm2")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, but is {family!r}")
    return FAMILIES[family].model_validate(fields)


AnyShape = Annotated[
    ModelSettings | LstmSettings, WrapValidator(lambda value, by_trying: read_shape(value))
]
"""Read by the family that is named, so that what is wrong is said of that one alone."""
