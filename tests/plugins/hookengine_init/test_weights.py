"""Weights from outside: files of others load, what does not fit is said whole, nothing runs."""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
import pickle
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from hookengine import save_weights
from hookengine.model import BaseModule, PretrainedInit, initialize, load_weights


class Net(BaseModule):
    def __init__(self, init_cfg: Any = None, classes: int = 3) -> None:
        super().__init__(init_cfg)
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)


def filled(value: float, **options: Any) -> Net:
    net = Net(**options)
    for tensor in net.state_dict().values():
        tensor.fill_(value)
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def source() -> Net:
    return filled(2)


# -- forms of checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrapped_and_prefixed_checkpoints_load(
    key: str | None, prefix: str, tmp_path: Path, source: Net
) -> None:
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "net.pth")
    net = Net()
    assert not any(load_weights(net, tmp_path / "net.pth"))
    assert same(net, source)


def test_compiled_parts_load_from_uncompiled_ones_and_back(tmp_path: Path, source: Net) -> None:
    compiled = filled(3)
    compiled.backbone = torch.compile(compiled.backbone, backend="eager")  # type: ignore[assignment]
    assert "backbone._orig_mod.0.weight" in compiled.state_dict()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "plain.pth")
    torch.save(compiled.state_dict(), tmp_path / "compiled.pth")
    net = Net()
    assert not any(load_weights(net, tmp_path / "compiled.pth"))
    assert all((tensor == 3).all() for tensor in net.state_dict().values())
    assert not any(load_weights(compiled, tmp_path / "plain.pth"))
    assert all((tensor == 2).all() for tensor in compiled.state_dict().values())
    for prefix in ("backbone", "backbone._orig_mod"):
        body = Net().backbone
        load_weights(body, tmp_path / "compiled.pth", prefix=prefix)
        assert (body[0].weight == 3).all()
    whole: Any = torch.compile(Net(), backend="eager")
    load_weights(whole, tmp_path / "compiled.pth")
    assert (whole.head.weight == 3).all()


def test_the_file_of_before_torch_1_6_loads(tmp_path: Path, source: Net) -> None:
    path = tmp_path / "net.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    net = Net()
    load_weights(net, path)
    assert same(net, source)


def test_safetensors_load(tmp_path: Path, source: Net) -> None:
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    net = Net(dict(type="Pretrained", checkpoint=str(tmp_path / "net.safetensors")))
    net.init_weights()
    assert same(net, source)


def test_torchvision_and_timm_style_files_load(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    source = resnet18()
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    torch.save({"state_dict_ema": {}, "state_dict": source.state_dict()}, tmp_path / "b.pth")
    inner = {"state_dict": {}, "model": {"depth": 18}, "model_state_dict": source.state_dict()}
    torch.save(inner, tmp_path / "c.pth")
    for name in ("a.pth", "b.pth", "c.pth"):
        model = resnet18()
        load_weights(model, tmp_path / name)
        assert same(model, source)


def test_a_prefix_takes_what_is_below_it(tmp_path: Path, source: Net) -> None:
    torch.save({"state_dict": source.state_dict()}, tmp_path / "detector.pth")
    for prefix in ("backbone", "backbone."):
        backbone = Net().backbone
        initialize(
            backbone,
            dict(type="Pretrained", checkpoint=str(tmp_path / "detector.pth"), prefix=prefix),
        )
        assert same(backbone, source.backbone)
    with pytest.raises(
        ValueError, match=r"no weights below prefix='neck'.*begin with backbone, head"
    ):
        load_weights(Net().backbone, tmp_path / "detector.pth", prefix="neck")


def test_a_module_of_its_own_that_is_called_module_is_no_prefix(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

    source = Wrapper()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    net = Wrapper()
    load_weights(net, tmp_path / "net.pth")
    assert same(net, source)


def test_map_location_reaches_torch(tmp_path: Path, source: Net) -> None:
    torch.save(source.state_dict(), tmp_path / "net.pth")
    net = filled(1)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded. Error.*Cannot copy out of meta"):
        PretrainedInit(tmp_path / "net.pth", map_location="meta")(net)
    assert same(net, filled(1))


def test_the_versions_that_modules_save_are_kept(tmp_path: Path, source: Net) -> None:
    torch.save(source.state_dict(), tmp_path / "net.pth")
    seen = {}

    class Versioned(nn.BatchNorm1d):
        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *a: Any) -> None:
            seen[prefix] = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *a)

    net = Net()
    net.backbone[1] = Versioned(4)
    load_weights(net, tmp_path / "net.pth")
    assert seen == {"backbone.1.": 2}
    load_weights(net.backbone, tmp_path / "net.pth", prefix="backbone")
    assert seen == {"backbone.1.": 2, "1.": 2}


@pytest.fixture
def mmengine_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Net) -> Path:
    """As MMEngine's Runner saves it: a history with bound methods, numpy's scalars and arrays."""
    name = "mmengine.logging.history_buffer"

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"mean": self.mean}

        def mean(self) -> float:
            raise AssertionError("the history was asked")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    with monkeypatch.context() as patch:
        for module in ("mmengine", "mmengine.logging", name):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[name].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        content = {
            "meta": {"epoch": np.int64(1), "seed": np.float64(0.5), "array": np.zeros((2, 2))},
            "state_dict": source.state_dict(),
            "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
        }
        torch.save(content, tmp_path / "mmengine.pth")
    named = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "mmengine.pth")
    assert {f"{name}.HistoryBuffer", "builtins.getattr", "numpy.ndarray"} <= set(named)
    return tmp_path / "mmengine.pth"


def test_what_old_and_new_versions_call_numpys_and_paths_objects_loads(
    tmp_path: Path, source: Net
) -> None:
    content = {"state_dict": source.state_dict(), "best": np.float32(0.5), "dir": Path("work_dir")}
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    for change in (
        (b"", b""),
        (b"numpy._core", b"numpy.core"),
        (b"pathlib\n", b"pathlib._local\n"),
    ):
        path.write_bytes(written.replace(*change) if change[0] else written)
        net = Net()
        load_weights(net, path)
        assert same(net, source)


def test_a_checkpoint_of_mmengine_loads_without_mmengine(
    mmengine_checkpoint: Path, source: Net
) -> None:
    net = Net()
    load_weights(net, mmengine_checkpoint)
    assert same(net, source)
    with pytest.raises(pickle.UnpicklingError):  # torch alone: nothing was made safe for good
        torch.load(mmengine_checkpoint, weights_only=True)


def test_tied_weights_load_from_safetensors(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

    source, net = Tied(), Tied()
    save_model(source, str(tmp_path / "tied.safetensors"))  # which holds the weight once
    assert not load_weights(net, tmp_path / "tied.safetensors")
    assert same(net, source)


def test_the_format_is_told_by_the_content(tmp_path: Path, source: Net) -> None:
    save_file(source.state_dict(), tmp_path / "net.pth")
    torch.save(source.state_dict(), tmp_path / "net.safetensors")
    for name in ("net.pth", "net.safetensors"):
        net = Net()
        load_weights(net, tmp_path / name, map_location=torch.device("cpu"))
        assert same(net, source)


def test_an_old_batch_norm_without_a_counter_loads_strictly(source: Net) -> None:
    state = source.state_dict()  # of version 2, so that torch misses the counter
    del state["backbone.1.num_batches_tracked"]
    assert not load_weights(Net(), state)


def test_lazy_modules_learn_their_shape_from_the_weights(source: Net) -> None:
    net = nn.Sequential(nn.LazyLinear(4))
    state = {"0.weight": torch.ones(4, 2), "0.bias": torch.ones(4)}
    assert not load_weights(net, state)
    assert net[0].weight.shape == (4, 2)
    both = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"1\.bias \[1\] here, \[9\] there"):
        load_weights(both, {**state, "1.bias": torch.ones(9)})
    assert isinstance(both[0].weight, nn.UninitializedParameter)
    with pytest.raises(ValueError, match="nothing was loaded"):  # found out when all is loaded
        load_weights(both, {**state, "1.bias": torch.ones(1), "2.bias": torch.ones(1)})
    assert isinstance(both[0].weight, nn.UninitializedParameter)
    assert both(torch.ones(1, 7)).shape == (1, 1)


# -- what does not fit --------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_in_one_message(tmp_path: Path, source: Net) -> None:
    state = source.state_dict()
    state["neck.weight"] = state.pop("backbone.0.bias")
    state["head.weight"] = torch.ones(7, 4)
    torch.save(state, tmp_path / "net.pth")
    net = filled(1)
    with pytest.raises(ValueError, match="does not fit Net, so nothing was loaded") as caught:
        load_weights(net, tmp_path / "net.pth")
    text = str(caught.value)
    assert "missing in the checkpoint (1): backbone.0.bias" in text
    assert "unexpected in the checkpoint (1): neck.weight" in text
    assert "of a different shape (1): head.weight [3, 4] here, [7, 4] there" in text
    assert "ignore_mismatched_sizes=True loads the other tensors" in text
    assert same(net, filled(1))
    assert not net.loaded_tensors


def test_strict_refuses_what_one_side_lacks(source: Net) -> None:
    state = source.state_dict()
    del state["head.bias"]
    net = filled(1)
    with pytest.raises(
        ValueError, match=r"(?s)strict=False loads the tensors that both have.*missing.*head\.bias"
    ):
        load_weights(net, state)
    assert same(net, filled(1))


def test_pretrained_warns_once_of_what_one_side_lacks(
    capsys: pytest.CaptureFixture[str], source: Net
) -> None:
    state = source.state_dict()
    state["fc.weight"] = state.pop("head.bias")
    net = filled(1)
    result = load_weights(net, state, strict=False)
    assert result == (["head.bias"], ["fc.weight"], {})
    first, *rest = capsys.readouterr().out.splitlines()
    assert "warning" in first
    assert "loaded 8 of 9 tensors of Net from the state dict" in first
    assert [line.rstrip() for line in rest] == [
        "  missing in the checkpoint (1): head.bias",
        "  unexpected in the checkpoint (1): fc.weight",
    ]
    assert net.head.bias.tolist() == [1, 1, 1]
    assert net.head.weight[0].tolist() == [2, 2, 2, 2]


def test_a_new_head_is_left_where_it_is_asked_for(tmp_path: Path, source: Net) -> None:
    torch.save(source.state_dict(), tmp_path / "net.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth"))
    with pytest.raises(ValueError, match=r"head\.weight \[5, 4\] here, \[3, 4\] there"):
        Net(cfg, classes=5).init_weights()
    net = Net(dict(cfg, ignore_mismatched_sizes=True), classes=5)
    before = net.head.weight.clone()
    net.init_weights()
    assert same(net.backbone, source.backbone)
    assert torch.equal(net.head.weight, before)
    loaded = {id(tensor) for tensor in net.loaded_tensors}
    assert id(net.backbone[0].weight) in loaded
    assert id(net.head.weight) not in loaded  # so that it may still be initialised


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.LSTM(2, 2).state_dict(), tmp_path / "lstm.pth")
    net = Net(dict(type="Pretrained", checkpoint=str(tmp_path / "lstm.pth")))
    with pytest.raises(
        ValueError, match=r"(?s)None of its tensors fits.*missing in the checkpoint \(8\)"
    ):
        net.init_weights()
    assert not net.is_init


def test_a_module_may_make_old_shapes_fit(source: Net) -> None:
    """As OpenMMLab's backbones resize their position embeddings when they load."""

    def cut(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"][:2]
        state[prefix + "bias"] = state[prefix + "bias"][:2]

    net = Net(classes=2)
    net.head.register_load_state_dict_pre_hook(cut)
    assert not any(load_weights(net, source.state_dict()))
    assert net.head.bias.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("target", "prefix", "advice"),
    [
        (lambda net: net.backbone, "model.", "It fits with prefix='model.backbone'"),
        (lambda net: net, "model.", "It fits with prefix='model'"),
        (
            lambda net: nn.ModuleDict({"det": net}),
            "",
            "It fits a submodule.*get_submodule..det.*name=.det",
        ),
        (lambda net: nn.DataParallel(net), "", "It fits a submodule.*get_submodule..module"),
    ],
)
def test_where_it_would_fit_is_said(target: Any, prefix: str, advice: str, source: Net) -> None:
    state = {prefix + name: value for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match=f"nothing was loaded. {advice}"):
        load_weights(target(Net()), state)


def test_a_prefix_that_is_too_short_is_corrected(source: Net) -> None:
    state = {f"det.{name}": value for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match=r"begin with det\. It fits with prefix='det\.backbone'"):
        load_weights(Net().backbone, state, prefix="backbone")


def test_a_module_on_the_meta_device_is_refused(source: Net) -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        load_weights(net, source.state_dict())


class Extra(nn.Linear):
    """A layer with state beside its tensors."""

    def __init__(self, value: int) -> None:
        super().__init__(2, 2)
        self.value = value

    def get_extra_state(self) -> Any:
        return {"value": self.value}

    def set_extra_state(self, state: Any) -> None:
        self.value = state["value"]


def test_extra_state_is_loaded_or_left_with_the_rest() -> None:
    module, state = Extra(1), Extra(5).state_dict()
    with pytest.raises(ValueError, match=r"bias \[2\] here, \[3\] there") as caught:
        load_weights(module, {**state, "bias": torch.ones(3)})
    assert "unexpected" not in str(caught.value)
    assert module.value == 1
    with pytest.raises(ValueError, match="strict=False"):  # found out when all is loaded
        load_weights(module, {**state, "other": torch.ones(3)})
    assert module.value == 1
    load_weights(module, state)
    assert module.value == 5


def test_what_is_renamed_in_loading_is_given_back_too() -> None:
    class Renaming(Net):
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            for name in [name for name in state if name.startswith("stem.")]:
                state[name.replace("stem.", "head.")] = state.pop(name)
            super()._load_from_state_dict(state, prefix, *args)

    net = Renaming()
    for tensor in net.state_dict().values():
        tensor.fill_(1)
    state = filled(2).state_dict()
    renamed = {name.replace("head.", "stem."): value for name, value in state.items()}
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_weights(net, {**renamed, "other": torch.ones(1)})
    assert same(net, filled(1))
    assert not load_weights(net, renamed)
    assert same(net, filled(2))


def test_views_of_one_memory_are_not_taken_for_one_tensor() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flat", torch.zeros(4))
            self.register_buffer("first", self.flat[:2])

    with pytest.raises(ValueError, match=r"missing in the checkpoint \(1\): flat"):
        load_weights(Views(), {"first": torch.ones(2)})


def test_an_error_in_mid_load_leaves_what_was() -> None:
    class Broken(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head.register_load_state_dict_pre_hook(self.fail)

        def fail(self, *args: Any) -> None:
            raise OverflowError("in a hook of the model")

    net = Broken()
    for tensor in net.state_dict().values():
        tensor.fill_(1)
    with pytest.raises(OverflowError):
        load_weights(net, filled(2).state_dict())
    assert same(net, filled(1))


# -- bad files ----------------------------------------------------------------------------------


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None: ...  # pickle asks that what is called is callable


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, print, functools.partial, Path.touch],
    ids=lambda function: function.__name__,
)
def test_a_malicious_pickle_is_named_and_not_run(
    function: Any, legacy: bool, tmp_path: Path, source: Net
) -> None:
    victim = tmp_path / "victim"
    argument = f"open({str(victim)!r}, 'w')" if function in (eval, exec) else f"touch {victim}"
    content = {"state_dict": source.state_dict(), "x": Call(function, argument)}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=not legacy)
    net = filled(1, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "bad.pth")))
    with pytest.raises(
        ValueError, match=r"bad\.pth.*could run code. Nothing was loaded or run"
    ) as caught:
        net.init_weights()
    assert caught.value.__cause__ is None  # torch's own error advises weights_only=False
    assert same(net, filled(1))
    assert not victim.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_to_an_accelerator(suffix: str, tmp_path: Path, source: Net) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    net = Net().to(device)
    load_weights(net, path, map_location=device)
    assert same(net.cpu(), source)


@pytest.mark.parametrize(
    ("device", "said"), [("cuda", "no CUDA device is available"), ("gpu", "is not a torch device")]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_device_that_is_not_there_is_not_the_file_s_fault(
    device: str, said: str, suffix: str, tmp_path: Path, source: Net
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    torch.save(source.state_dict(), tmp_path / f"net{suffix}")
    with pytest.raises(ValueError, match=f"map_location='{device}'.*{said}"):
        load_weights(Net(), tmp_path / f"net{suffix}", map_location=device)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is a web page. Download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer"),
    ],
)
def test_what_a_file_really_is_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_weights(Net(), tmp_path / "net.pth")


def test_getattr_which_histories_need_leads_nowhere(tmp_path: Path, source: Net) -> None:
    call = Call(Call(getattr, Path, "touch"), str(tmp_path / "victim"))
    torch.save({"state_dict": source.state_dict(), "x": call}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth"):
        load_weights(Net(), tmp_path / "bad.pth")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_a_damaged_file_is_said_so(damage: str, suffix: str, tmp_path: Path, source: Net) -> None:
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"404 Not Found" * 9,
            "flipped": b"\xff" + whole[1:],
        }[damage]
    )
    net = filled(1)
    with pytest.raises(ValueError, match=rf"net\{suffix}( \(\d+ bytes\))? is damaged"):
        load_weights(net, path)
    assert same(net, filled(1))


def test_an_absent_file_is_said_so_with_its_neighbours(tmp_path: Path) -> None:
    for name in ("best.safetensors", "epoch_2.pth", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        FileNotFoundError,
        match=r"epoch_1\.pth does not exist. Its folder contains epoch_2\.pth, best\.safetensors$",
    ):
        load_weights(Net(), tmp_path / "epoch_1.pth")
    with pytest.raises(FileNotFoundError, match="nor does its folder"):
        load_weights(Net(), tmp_path / "gone" / "epoch_1.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint .*best\.safetensors, epoch_2\.pth$"
    ):
        load_weights(Net(), tmp_path)


def flips(path: Path) -> Iterator[int]:
    """Flip one bit of each byte of a file in turn; the file is then as it was."""
    content = bytearray(path.read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        yield place
        content[place] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_flipped_bit_changes_a_weight(suffix: str, tmp_path: Path) -> None:
    source = nn.Linear(2, 1)
    path = save_weights(source.state_dict(), tmp_path / f"net{suffix}")
    refused = 0
    for place in flips(path):
        net = nn.Linear(2, 1)
        before = [parameter.clone() for parameter in net.parameters()]
        try:
            load_weights(net, path)
        except ValueError:
            refused += 1
            assert all(map(torch.equal, net.parameters(), before)), place
        else:
            assert same(net, source), place
    assert refused > 100
    assert same(nn.Linear(2, 1), source) is False
    net = nn.Linear(2, 1)
    load_weights(net, path)
    assert same(net, source)


def test_pretrained_refuses_a_flipped_bit(tmp_path: Path, source: Net) -> None:
    path = tmp_path / "net.pth"
    torch.save(source.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(source.head.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.pth is damaged: the checksum of .* differs"):
        Net(dict(type="Pretrained", checkpoint=str(path))).init_weights()


def test_a_file_without_checksums_is_compared_with_the_hash_in_its_name(
    served: tuple[str, Path], source: Net, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = served
    old = folder / "net.pth"
    torch.save(source.state_dict(), old, _use_new_zipfile_serialization=False)
    right = hashlib.sha256(old.read_bytes()).hexdigest()[:8]
    for name in (f"net-{right}.pth", "net-20240131.pth", "net-v2.pth"):
        shutil.copy(old, folder / name)
        load_weights(Net(), folder / name)
        load_weights(Net(), f"{url}/{name}")
    assert capsys.readouterr().out == ""
    shutil.copy(old, folder / "net-abcdef12.pth")
    load_weights(Net(), folder / "net-abcdef12.pth")  # it may have been renamed
    assert "is damaged, or abcdef12 in its name is no hash" in capsys.readouterr().out
    with pytest.raises(ValueError, match="abcdef12 in its name is no hash") as caught:
        load_weights(Net(), f"{url}/net-abcdef12.pth")
    assert "has been deleted" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "it is a list"),
        ({"epoch": 3}, "it is a dict with 'epoch'"),
        ({"state_dict": {}}, "it is a dict with 'state_dict'"),
        ({"weight": np.ones(2)}, "it is a dict with 'weight', whose values include NumPy"),
        ({1: torch.ones(2)}, "it is a dict with 1"),
    ],
)
def test_a_file_without_weights_is_said_so(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=f"holds no weights: {said}"):
        load_weights(Net(), tmp_path / "none.pth")


# -- elsewhere ----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A real server on the loopback, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once(served: tuple[str, Path], source: Net) -> None:
    url, folder = served
    torch.save(source.state_dict(), folder / "net.pth")
    net = Net(dict(type="Pretrained", checkpoint=f"{url}/net.pth"))
    net.init_weights()
    assert same(net, source)
    (folder / "net.pth").unlink()
    again = Net(dict(type="Pretrained", checkpoint=f"{url}/net.pth"))
    again.init_weights()
    assert same(again, source)


def test_a_url_that_fails_is_said_so_and_leaves_nothing(served: tuple[str, Path]) -> None:
    url, folder = served
    with pytest.raises(
        OSError, match=r"cannot download .*/gone\.pth: HTTP Error 404.*pass the path"
    ):
        load_weights(Net(), f"{url}/gone.pth")
    torch.save(Net().state_dict(), folder / "gone.pth")
    load_weights(Net(), f"{url}/gone.pth")


def test_a_download_that_was_cut_off_is_not_kept(served: tuple[str, Path], source: Net) -> None:
    url, folder = served
    torch.save(source.state_dict(), folder / "net.pth")
    whole = (folder / "net.pth").read_bytes()
    (folder / "net.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged") as caught:
        load_weights(Net(), f"{url}/net.pth")
    assert f"it was downloaded from {url}/net.pth, and has been deleted" in caught.value.__notes__
    (folder / "net.pth").write_bytes(whole)
    net = Net()
    load_weights(net, f"{url}/net.pth")
    assert same(net, source)


def test_torchvisions_names_are_its_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(url: str, path: str, **options: Any) -> None:
        asked.append(url)
        torch.save(nn.Linear(2, 2).state_dict(), path)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)  # there is no network here
    load_weights(nn.Linear(2, 2), "torchvision://resnet50")
    load_weights(nn.Linear(2, 2), "torchvision://resnet50.imagenet1k_v2")
    assert [url.rpartition("/")[2] for url in asked] == [
        "resnet50-0676ba61.pth",
        "resnet50-11ad3fa6.pth",
    ]
    with pytest.raises(
        ValueError, match="no weights 'v9' for resnet50, which has imagenet1k_v1, imagenet1k_v2"
    ):
        load_weights(nn.Linear(2, 2), "torchvision://resnet50.v9")
    with pytest.raises(ValueError, match=r"no model 'resnet5O'\. Did you mean 'resnet50'"):
        load_weights(nn.Linear(2, 2), "torchvision://resnet5O")
    with pytest.raises(ValueError, match=r"cannot read s3://bucket/net\.pth. Expected a path"):
        load_weights(nn.Linear(2, 2), "s3://bucket/net.pth")
