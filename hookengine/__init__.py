"""hookengine: a training loop that emits events, and plugins that implement them."""

from hookengine import dist
from hookengine.batches import BatchSizeError, SampleCounter, batch_size
from hookengine.evaluator import (
    BaseMetric,
    Evaluator,
    greater_is_better,
    metric_numbers,
    metric_value,
)
from hookengine.events.dispatch import Observer
from hookengine.events.hookimpl import hookimpl
from hookengine.events.hookspecs import EVENTS, Phase
from hookengine.events.manager import PluginManager
from hookengine.events.order import Place
from hookengine.events.plugin import DEFAULT_PLUGINS, Plugin
from hookengine.loop.data import (
    SeekableLoader,
    is_consecutive,
    is_seekable,
    length_of,
)
from hookengine.loop.optim import OptimWrapper, OptimWrapperDict
from hookengine.loop.progress import Progress
from hookengine.model.base_model import BaseModel
from hookengine.model.compiled import names_as_in, original_names
from hookengine.model.loaded import loaded_tensors, remember_loaded
from hookengine.model.modules import BaseModule, ModuleDict, ModuleList, Sequential
from hookengine.monitored import MonitoredMetric
from hookengine.random_state import get_random_state, preserved_random_state, set_random_state
from hookengine.records.log_context import log_context
from hookengine.records.media import Histogram, Image, Table, as_medium
from hookengine.records.open_files import keep_open
from hookengine.records.record import Record, RecordHistory, read_records
from hookengine.records.recording import missing_records
from hookengine.records.run_folder import RunFolder
from hookengine.records.sink import RunInfo, Sink
from hookengine.registry import (
    MODEL_WRAPPERS,
    MODELS,
    PLUGINS,
    WEIGHT_INITIALIZERS,
    Registry,
    did_you_mean,
)
from hookengine.runner import Runner
from hookengine.setup.config import EvalCfg, TrainCfg
from hookengine.setup.dataloaders import copy_dataloader, samplers_of, samples_per_batch
from hookengine.setup.description import options_of
from hookengine.setup.environment import describe_environment
from hookengine.setup.plain import as_plain, not_plain
from hookengine.setup.weights_file import load_safetensors, save_weights

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PLUGINS",
    "EVENTS",
    "MODELS",
    "MODEL_WRAPPERS",
    "PLUGINS",
    "WEIGHT_INITIALIZERS",
    "BaseMetric",
    "BaseModel",
    "BaseModule",
    "BatchSizeError",
    "EvalCfg",
    "Evaluator",
    "Histogram",
    "Image",
    "ModuleDict",
    "ModuleList",
    "MonitoredMetric",
    "Observer",
    "OptimWrapper",
    "OptimWrapperDict",
    "Phase",
    "Place",
    "Plugin",
    "PluginManager",
    "Progress",
    "Record",
    "RecordHistory",
    "Registry",
    "RunFolder",
    "RunInfo",
    "Runner",
    "SampleCounter",
    "SeekableLoader",
    "Sequential",
    "Sink",
    "Table",
    "TrainCfg",
    "as_medium",
    "as_plain",
    "batch_size",
    "copy_dataloader",
    "describe_environment",
    "did_you_mean",
    "dist",
    "get_random_state",
    "greater_is_better",
    "hookimpl",
    "is_consecutive",
    "is_seekable",
    "keep_open",
    "length_of",
    "load_safetensors",
    "loaded_tensors",
    "log_context",
    "metric_numbers",
    "metric_value",
    "missing_records",
    "names_as_in",
    "not_plain",
    "options_of",
    "original_names",
    "preserved_random_state",
    "read_records",
    "remember_loaded",
    "samplers_of",
    "samples_per_batch",
    "save_weights",
    "set_random_state",
]
