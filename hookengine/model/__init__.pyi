# Made by `make docs` from the entry points in pyproject.toml.

from hookengine.model.base_model import (
    BaseModel,
)
from hookengine.model.modules import (
    BaseModule,
    ModuleDict,
    ModuleList,
    Sequential,
)
from hookengine_averaging import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from hookengine_distributed import (
    MMDistributedDataParallel,
    MMFullyShardedDataParallel,
    MMSeparateDistributedDataParallel,
)
from hookengine_init import (
    BaseInit,
    Caffe2XavierInit,
    ConstantInit,
    KaimingInit,
    NormalInit,
    PretrainedInit,
    TruncNormalInit,
    UniformInit,
    XavierInit,
    bias_init_with_prob,
    caffe2_xavier_init,
    constant_init,
    init_weights,
    initialize,
    kaiming_init,
    load_weights,
    normal_init,
    trunc_normal_init,
    uniform_init,
    update_init_info,
    xavier_init,
)
from hookengine_model_utilities import (
    detect_anomalous_params,
    is_model_wrapper,
    merge_dict,
)
from hookengine_paramwise import (
    param_groups,
)
from hookengine_preprocess import (
    BaseDataPreprocessor,
    ImgDataPreprocessor,
    stack_batch,
)
from hookengine_syncbn import (
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)

__all__ = [
    "BaseAveragedModel",
    "BaseDataPreprocessor",
    "BaseInit",
    "BaseModel",
    "BaseModule",
    "Caffe2XavierInit",
    "ConstantInit",
    "ExponentialMovingAverage",
    "ImgDataPreprocessor",
    "KaimingInit",
    "MMDistributedDataParallel",
    "MMFullyShardedDataParallel",
    "MMSeparateDistributedDataParallel",
    "ModuleDict",
    "ModuleList",
    "MomentumAnnealingEMA",
    "NormalInit",
    "PretrainedInit",
    "Sequential",
    "StochasticWeightAverage",
    "TruncNormalInit",
    "UniformInit",
    "XavierInit",
    "bias_init_with_prob",
    "caffe2_xavier_init",
    "constant_init",
    "convert_sync_batchnorm",
    "detect_anomalous_params",
    "init_weights",
    "initialize",
    "is_model_wrapper",
    "kaiming_init",
    "load_weights",
    "merge_dict",
    "normal_init",
    "param_groups",
    "revert_sync_batchnorm",
    "stack_batch",
    "trunc_normal_init",
    "uniform_init",
    "update_init_info",
    "xavier_init",
]
