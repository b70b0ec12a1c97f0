"""Fully sharded training with torch's FSDP2, behind the interface of MMEngine's wrapper."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from hookengine import OptimWrapper, OptimWrapperDict, dist
from hookengine_distributed.exchange import Exchange
from hookengine_distributed.steps import ModelSteps

Policy: TypeAlias = (
    "int | str | type[nn.Module] | Iterable[Any] | Mapping[str, Any] | Callable[..., bool]"
)

RESHARDS = {"FULL_SHARD": True, "SHARD_GRAD_OP": False}
"""FSDP2's ``reshard_after_forward`` for each of FSDP1's sharding strategies."""


class MMFullyShardedDataParallel(ModelSteps, nn.Module):
    """Shard the parameters, gradients and optimizer states of a model across the ranks.

    It uses torch's FSDP2 (``fully_shard``) in place: ``module`` keeps the names of its parameters,
    which become DTensors. If an optimizer holds the parameters from before, the first
    ``train_step``, or the Runner, replaces them with the DTensors.

    Args:
        module: The model, with the same weights on all ranks.
        process_group: The ranks to shard across; by default all. You can pass ``mesh=`` instead.
        sharding_strategy: ``"FULL_SHARD"`` (default) or ``"SHARD_GRAD_OP"``, which keeps the
            parameters unsharded between the forward and the backward pass.
        cpu_offload: Whether to keep parameters, gradients and optimizer states in host memory.
        auto_wrap_policy: Which parts are gathered separately, so that not all parameters are
            unsharded at once. A number selects parts with at least that many parameters. Classes of
            modules, or their names, select those modules. You can also pass
            ``dict(type="size_based_auto_wrap_policy", min_num_params=...)``,
            ``dict(type="transformer_auto_wrap_policy", transformer_layer_cls=...)``, or a function
            of ``(module, recurse, nonwrapped_numel)``, as in FSDP1. The model must use a part by
            calling it. By default, the model is one part.
        backward_prefetch: ``"BACKWARD_PRE"`` or None, because FSDP2 prefetches by itself.
        mixed_precision: ``dict(param_dtype="bfloat16", reduce_dtype="float32")``, or torch's
            ``MixedPrecisionPolicy``.
        param_init_fn: Must be None, because the model is already initialized.
        use_orig_params: Must be True.
        **kwargs: Further arguments of ``fully_shard``.

    Raises:
        ValueError: An argument of FSDP1 has a value that FSDP2 does not support.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: torch_dist.ProcessGroup | None = None,
        sharding_strategy: str | None = None,
        cpu_offload: bool | OffloadPolicy | None = None,
        auto_wrap_policy: Policy | None = None,
        backward_prefetch: str | None = None,
        mixed_precision: Mapping[str, Any] | MixedPrecisionPolicy | None = None,
        param_init_fn: Any = None,
        use_orig_params: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if param_init_fn is not None or not use_orig_params:
            raise ValueError(
                "MMFullyShardedDataParallel shards an initialized model and keeps the names of its "
                "parameters. Remove param_init_fn and use_orig_params"
            )
        if backward_prefetch not in (None, "BACKWARD_PRE"):
            raise ValueError(
                f"backward_prefetch={backward_prefetch!r} is not supported, because FSDP2 "
                "prefetches like 'BACKWARD_PRE'. Remove it, or set your own order with "
                "set_modules_to_backward_prefetch"
            )
        if sharding_strategy is not None:
            if sharding_strategy not in RESHARDS:
                raise ValueError(
                    f"sharding_strategy={sharding_strategy!r} must be {' or '.join(RESHARDS)}. "
                    "Instead of NO_SHARD, use strategy='ddp'; instead of HYBRID_SHARD, pass mesh=, "
                    "a DeviceMesh of two dimensions"
                )
            kwargs.setdefault("reshard_after_forward", RESHARDS[sharding_strategy])
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        if "mesh" not in kwargs:
            kwargs["mesh"] = _mesh(device.type, process_group)
        kwargs["offload_policy"] = _offload(cpu_offload, device)
        kwargs["mp_policy"] = _precision(mixed_precision)
        names = {p: name for name, p in module.named_parameters()}
        self._before = {id(p): (weakref.ref(p), name) for p, name in names.items()}
        self._name = type(module).__name__  # which fully_shard changes
        for part in parts_to_wrap(module, auto_wrap_policy):
            fully_shard(part, **kwargs)
        fully_shard(module, **kwargs)
        self.module: Any = module
        self.exchange = Exchange()
        module.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.module.set_requires_gradient_sync(self.exchange.decide(id(self)))

    def train_step(self, data: Any, optim_wrapper: OptimWrapper | OptimWrapperDict) -> Any:
        """Run the model's ``train_step``.

        Raises:
            RuntimeError: ``train_step`` never called the model with gradients enabled.
        """
        if self._before:
            self._point_at_shards(optim_wrapper)
        self.exchange.begin(optim_wrapper)
        outputs = self.module.train_step(data, optim_wrapper)
        self.exchange.check(self._name)
        return outputs

    def _point_at_shards(self, optim_wrapper: OptimWrapper | OptimWrapperDict) -> None:
        """Replace the parameters of an optimizer that was built before the model was sharded."""
        now = dict(self.module.named_parameters())
        for wrapper in optim_wrapper.by_name().values():
            for group in wrapper.param_groups:
                for index, parameter in enumerate(group["params"]):
                    old, name = self._before.get(id(parameter), (None, ""))
                    if old is not None and old() is parameter:
                        group["params"][index] = now[name]
        self._before = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.module(*args, **kwargs)

    def exchange_now(self) -> None:
        """Exchange the gradients that earlier backward passes have left on the ranks."""
        self.module.set_requires_gradient_sync(True)
        # FSDP2 does this at the end of a backward pass; it has no public name.
        self.module._get_fsdp_state()._root_post_backward_final_callback()


def _mesh(device_type: str, group: torch_dist.ProcessGroup | None) -> DeviceMesh:
    if group is not None:
        return DeviceMesh.from_group(group, device_type)
    return init_device_mesh(device_type, (dist.get_world_size(),))


def _offload(wanted: bool | OffloadPolicy | None, device: torch.device) -> OffloadPolicy:
    if isinstance(wanted, OffloadPolicy):
        return wanted
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"cpu_offload must be True, False or torch's OffloadPolicy, got {wanted!r}")
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if wanted else OffloadPolicy()


def _precision(wanted: Mapping[str, Any] | MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    if wanted is None:
        return MixedPrecisionPolicy()
    if isinstance(wanted, MixedPrecisionPolicy):
        return wanted
    if not isinstance(wanted, Mapping):
        raise TypeError(
            "mixed_precision must be dict(param_dtype=..., reduce_dtype=...) or torch's "
            f"MixedPrecisionPolicy, got {wanted!r}"
        )
    if "buffer_dtype" in wanted:
        raise ValueError("mixed_precision: FSDP2 does not convert buffers. Remove buffer_dtype")
    dtypes = {
        name: getattr(torch, value) if isinstance(value, str) and name.endswith("dtype") else value
        for name, value in wanted.items()
    }
    return MixedPrecisionPolicy(**dtypes)


# -- which parts --------------------------------------------------------------------------------

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_WHOLE = (nn.MultiheadAttention,)
"""Modules that use the weights of their children without calling them."""


def parts_to_wrap(module: nn.Module, policy: Policy | None) -> list[nn.Module]:
    """Return the parts of ``module`` that a policy selects, the innermost first.

    Raises:
        TypeError: The policy has the wrong type.
        ValueError: The policy is invalid, or it names a class that no part of the model has.
    """
    if policy is None:
        return []
    chooses = _chooser(module, policy)
    chosen: list[nn.Module] = []
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(owner)

    def is_closed(part: nn.Module) -> bool:
        """Return whether the part shares none of its parameters with a module outside."""
        inside = {*part.modules()}
        return all(owners[parameter] <= inside for parameter in part.parameters())

    def visit(part: nn.Module, is_root: bool) -> int:
        """Count the parameters of the part that are in no selected part within it."""
        left = sum(p.numel() for p in part.parameters(recurse=False))
        if isinstance(part, _WHOLE):
            left = sum(p.numel() for p in part.parameters())
        else:
            left += sum(visit(child, is_root=False) for child in part.children())
        may = not is_root and not isinstance(part, _CONTAINERS)
        if may and chooses(part, left) and is_closed(part):
            chosen.append(part)
            return 0
        return left

    visit(module, is_root=True)
    return chosen


def _chooser(module: nn.Module, policy: Any) -> Callable[[nn.Module, int], bool]:
    if isinstance(policy, Mapping):
        options = dict(policy)
        kind = str(options.pop("type", ""))
        known = {
            "size_based_auto_wrap_policy": "min_num_params",
            "transformer_auto_wrap_policy": "transformer_layer_cls",
        }
        if known.get(kind) not in options or len(options) != 1:
            wanted = " or ".join(f"dict(type={k!r}, {v}=...)" for k, v in known.items())
            raise ValueError(f"auto_wrap_policy must be {wanted}, got {dict(policy)!r}")
        (policy,) = options.values()
    if isinstance(policy, (int, float)) and not isinstance(policy, bool):
        return lambda part, left: left >= policy
    if isinstance(policy, (str, type)):
        policy = [policy]
    if callable(policy):
        return lambda part, left: bool(policy(module=part, recurse=False, nonwrapped_numel=left))
    several = [*policy]

    def is_one(part: nn.Module, one: Any) -> bool:
        return isinstance(part, one) if isinstance(one, type) else type(part).__name__ == one

    for one in several:
        if not any(is_one(part, one) for part in module.modules()):
            names = {type(part).__name__ for part in module.modules()}
            raise ValueError(
                f"auto_wrap_policy: the model has no part of class "
                f"{getattr(one, '__name__', one)}; it has {', '.join(sorted(names))}"
            )
    return lambda part, left: any(is_one(part, one) for one in several)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a forward pass of the model needs all ranks."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def reshard(model: nn.Module) -> None:
    """Make each rank hold only its shards again, after a forward pass without gradients."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
