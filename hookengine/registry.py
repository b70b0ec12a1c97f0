"""Registries, under the path that MMEngine's scripts import them from."""

from hookengine.events.registry import (
    MODEL_WRAPPERS,
    MODELS,
    PLUGINS,
    WEIGHT_INITIALIZERS,
    Registry,
)

__all__ = ["MODELS", "MODEL_WRAPPERS", "PLUGINS", "WEIGHT_INITIALIZERS", "Registry"]
