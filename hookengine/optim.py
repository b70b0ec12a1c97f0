"""Optimizer wrappers, under the path that MMEngine's scripts import them from."""

from hookengine.loop.optim import OptimWrapper, OptimWrapperDict

__all__ = ["OptimWrapper", "OptimWrapperDict"]
