"""Private names that the project uses: all of them listed, and each still what it was.

A name that changes in a new torch fails here by name, before a user meets it.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]


def _tied() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def _registries() -> None:
    model = _tied()
    assert list(model._modules) == ["0", "1"]
    assert list(model[0]._parameters) == ["weight", "bias"]
    assert "running_mean" in model[1]._buffers


def _non_persistent() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("left", torch.zeros(1), persistent=False)
    assert module._non_persistent_buffers_set == {"left"}


def _hooks() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    assert len(module._forward_hooks) == 1
    assert len(module._forward_hooks_with_kwargs) == 1
    assert len(module._forward_hooks_always_called) == 1


def _loading() -> None:
    seen: list[str] = []

    class Loads(nn.Linear):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            seen.append("called")
            super()._load_from_state_dict(*args, **kwargs)

    module = Loads(1, 1)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    assert len(module._load_state_dict_pre_hooks) == 1
    state = module.state_dict()
    assert "version" in state._metadata[""]  # type: ignore[attr-defined]
    module.load_state_dict(state)
    assert seen == ["called"]


def _apply() -> None:
    seen: list[str] = []

    class Moves(nn.Linear):
        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("called")
            return super()._apply(*args, **kwargs)

    Moves(1, 1).double()
    assert seen == ["called"]


def _call() -> None:
    class Routed(nn.Linear):
        def _call_impl(self, *args: Any, **kwargs: Any) -> str:
            return "routed"

    assert Routed(1, 1)(torch.zeros(1)) == "routed"
    module = nn.Linear(1, 1)
    assert module._compiled_call_impl is None
    module._compiled_call_impl = lambda *_: "compiled"
    assert module(torch.zeros(1)) == "compiled"


def _version() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


def _iterator() -> None:
    loader: Any = copy.copy(DataLoader([1, 2]))  # type: ignore[arg-type]
    vars(loader)["_iterator"] = None
    assert len(list(loader)) == 2
    assert vars(DataLoader([1]))["_iterator"] is None  # type: ignore[arg-type]


def _foreach() -> None:
    ones, twos = [torch.ones(2)], [torch.full((2,), 2.0)]
    torch._foreach_lerp_(ones, twos, 0.5)
    torch._foreach_mul_(ones, 2.0)
    torch._foreach_copy_(twos, ones)
    assert twos[0].tolist() == [3.0, 3.0]


def _scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert "_growth_tracker" in scaler.state_dict()


def _engine() -> None:
    called: list[str] = []

    class Queues(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: called.append("end"))
            return grads[0]

    leaf = torch.ones(1, requires_grad=True)
    Queues.apply(leaf).sum().backward()
    assert called == ["end"]


def _own_hooks() -> None:
    compiled: Any = torch.compile(nn.Linear(1, 1), backend="eager")
    compiled.register_forward_hook(lambda *_: None)
    compiled.register_forward_pre_hook(lambda *_: None)
    assert len(compiled._forward_hooks) == len(compiled._forward_pre_hooks) == 1
    assert not compiled._orig_mod._forward_hooks


def _compiled() -> None:
    module = nn.Linear(1, 1)
    compiled: Any = torch.compile(module, backend="eager")
    assert compiled._orig_mod is module
    assert "dynamo_ctx" in vars(compiled)
    assert callable(compiled.dynamo_ctx(module._call_impl))
    assert module._compiled_call_impl is None


def _store() -> None:
    assert callable(torch_dist.distributed_c10d._get_default_store)


def _ignored_by_ddp() -> None:
    model = nn.Linear(1, 1)
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, ["weight"])
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]


def _sharded() -> None:
    assert hasattr(FSDPModule, "_get_fsdp_state")
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert callable(FSDPState._root_post_backward_final_callback)


def _shards() -> None:
    assert callable(FileSystemReader._get_metadata_path)
    assert callable(torch.serialization._get_layout)


def _normalizations() -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    assert issubclass(nn.BatchNorm2d, _BatchNorm)
    assert issubclass(nn.SyncBatchNorm, _BatchNorm)


def _warning_functions() -> None:
    assert callable(warnings._showwarnmsg_impl)  # type: ignore[attr-defined]
    assert callable(warnings._showwarning_orig)  # type: ignore[attr-defined]


def _steps_before_schedules() -> None:
    for called, warns in ((False, 1), (True, 0)):
        optimizer: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        if called:
            optimizer._opt_called = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        assert len(caught) == warns


def _parts_of_schedules() -> None:
    schedulers = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    part = schedulers.StepLR(optimizer, 1)
    sequence = schedulers.SequentialLR(optimizer, [part], [])
    assert (sequence._schedulers, sequence._milestones) == ([part], [])
    assert schedulers.ChainedScheduler([part])._schedulers == [part]


def _order_of_hooks() -> None:
    import pluggy

    spec, impl = pluggy.HookspecMarker("p"), pluggy.HookimplMarker("p")

    class Specs:
        @spec
        def event(self) -> None: ...

    class Plugin:
        @impl
        def event(self) -> Plugin:
            return self

    manager = pluggy.PluginManager("p")
    manager.add_hookspecs(Specs)
    plugins = [Plugin(), Plugin()]
    for plugin in plugins:
        manager.register(plugin)
    assert manager.hook.event() == plugins[::-1]
    manager.hook.event._hookimpls[:] = manager.hook.event.get_hookimpls()[::-1]
    assert manager.hook.event() == plugins


def _fork_servers() -> None:
    from multiprocessing import forkserver, popen_forkserver

    server: Any = vars(forkserver)["_forkserver"]
    assert isinstance(server._preload_modules, list)
    # A worker starts from another server while this name stands for that server's method.
    assert "forkserver.connect_to_new_process(" in inspect.getsource(popen_forkserver.Popen)
    assert forkserver.ForkServer().connect_to_new_process is not None


def _font_cache() -> None:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    assert font_manager.get_font(font.fname) is font
    vars(font_manager)["_get_font"].cache_clear()
    assert font_manager.get_font(font.fname) is not font


CANARIES: dict[tuple[str, ...], Callable[[], None]] = {
    ("_modules", "_parameters", "_buffers"): _registries,
    ("_non_persistent_buffers_set",): _non_persistent,
    ("_hooks_with_kwargs", "_hooks_always_called"): _hooks,
    ("_load_from_state_dict", "_load_state_dict_pre_hooks", "_metadata"): _loading,
    ("_forward_hooks", "_forward_pre_hooks"): _own_hooks,
    ("_apply",): _apply,
    ("_call_impl", "_compiled_call_impl"): _call,
    ("_version",): _version,
    ("_iterator",): _iterator,
    ("_foreach_copy_", "_foreach_lerp_", "_foreach_mul_"): _foreach,
    ("_growth_tracker",): _scaler,
    ("_execution_engine",): _engine,
    ("_orig_mod",): _compiled,
    ("_get_default_store",): _store,
    ("_ddp_params_and_buffers_to_ignore",): _ignored_by_ddp,
    ("_get_fsdp_state", "_root_post_backward_final_callback"): _sharded,
    ("_get_metadata_path", "_get_layout"): _shards,
    ("_BatchNorm",): _normalizations,
    ("_showwarnmsg_impl", "_showwarning_orig"): _warning_functions,
    ("_forkserver", "_preload_modules"): _fork_servers,
    ("_hookimpls",): _order_of_hooks,
    ("_opt_called",): _steps_before_schedules,
    ("_schedulers", "_milestones"): _parts_of_schedules,
    ("_get_font",): _font_cache,
}
DOCUMENTED = {"_exit", "_getframe", "_asdict"}  # of os, sys, tuples: private by name only
OWN_KEYS = {  # parts of our own names, in strings
    *("_cfg", "_step", "_iter", "_state_dict", "_evaluator", "_extra_state", "_timestamp"),
    *("_params_init_info", "_sink_current", "_base", "_loaded_names"),
}


@pytest.mark.parametrize("names", CANARIES, ids=" ".join)
def test_it_is_still_what_it_was(names: tuple[str, ...]) -> None:
    CANARIES[names]()


def _used_and_own() -> tuple[set[str], set[str]]:
    used: set[str] = set()
    own: set[str] = set()
    for path in [p for base in ("hookengine", "plugins") for p in (ROOT / base).glob("**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=name, ctx=context):
                    (own if isinstance(context, ast.Store) else used).add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    own.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
                case ast.ImportFrom(names=aliases):
                    used |= {alias.name for alias in aliases}
                case ast.Constant(value=str(name)):
                    used.add(name)
                case ast.Call(func=ast.Attribute(attr="setdefault"), args=[ast.Constant(v)]):
                    own.add(str(v))
    return used, own


def _in_torch() -> set[str]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loader: Any = DataLoader([1])  # type: ignore[arg-type]
    owners = (nn.Linear(1, 1), torch.zeros(1), loader, optimizer, scheduler)
    return {name for owner in owners for name in dir(owner)}


def test_all_of_them_are_listed() -> None:
    used, own = _used_and_own()
    private = {name for name in used if re.fullmatch(r"_[a-zA-Z]\w*", name)}
    foreign = {name for name in private if name not in own or name in _in_torch()}
    listed = {name for names in CANARIES for name in names}
    known = listed | DOCUMENTED | OWN_KEYS
    assert not foreign - known, "add a canary for each of these, and a row in CONTRIBUTING.md"
    assert listed <= private | own, (
        "no longer used: remove the canary, and the row in CONTRIBUTING.md"
    )


def test_contributing_lists_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Private names")[2].partition("\n## ")[0]
    listed = {name for names in CANARIES for name in names}
    assert set(re.findall(r"`(_\w+)`", section)) == listed
