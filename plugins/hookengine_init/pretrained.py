"""``Pretrained``: initialize a module with weights from a file."""

from __future__ import annotations

import os

from torch import nn

from hookengine_init.record import console, record_of
from hookengine_init.weights import load_weights


class PretrainedInit:
    """Load weights from a file into the module.

    Names that one side lacks are reported in one warning, provided that some tensors fit. Shapes
    that differ are an error, unless ``ignore_mismatched_sizes`` leaves these tensors unchanged.

    Args:
        checkpoint: A path or URL; see ``read_weights``.
        prefix: Load the weights below this prefix, such as ``"backbone."`` of a detector.
        map_location: Where to load the tensors.
        ignore_mismatched_sizes: Leave tensors of a different shape unchanged, such as a new head.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        prefix: str | None = None,
        map_location: str = "cpu",
        ignore_mismatched_sizes: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.map_location = map_location
        self.ignore_mismatched_sizes = ignore_mismatched_sizes

    def __call__(self, module: nn.Module) -> None:
        """Load the weights; see ``load_weights`` for the errors it raises."""
        record = record_of(module)
        logger = record.logger if record is not None else console()
        what = f"load {self.prefix} in model" if self.prefix is not None else "load model"
        logger.info(f"{what} from: {self.checkpoint}")
        mismatch = load_weights(
            module,
            self.checkpoint,
            prefix=self.prefix,
            map_location=self.map_location,
            strict=False,
            ignore_mismatched_sizes=self.ignore_mismatched_sizes,
            logger=logger,
        )
        if record is not None:
            for name, parameter in module.named_parameters():
                if name not in mismatch.missing and name not in mismatch.misshapen:
                    record.wrote(parameter, None, self._get_init_info())

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: load from {self.checkpoint}"
