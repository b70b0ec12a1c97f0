"""Files of weights alone: what is written is read back, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hookengine import load_safetensors, save_weights


def tensors() -> dict[str, Tensor]:
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "part": whole.t(),
        "same": whole[1],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 2),
        "count": torch.tensor(3),
        "wave": torch.ones(2, dtype=torch.complex64),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = save_weights(tensors(), tmp_path / "folder" / f"w{suffix}")
    read = load_safetensors(path) if suffix == ".safetensors" else torch.load(path)
    assert {*read} == {*tensors()}
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_a_file_of_others_has_no_checksum_to_compare(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt", "crc32": "of something else"}):
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", metadata)
        assert load_safetensors(tmp_path / "w.safetensors")["w"].tolist() == [1, 1]


def test_changed_values_are_noticed(tmp_path: Path) -> None:
    path = save_weights(tensors(), tmp_path / "w.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its checksum differs"):
        load_safetensors(path)
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"deserializing header: .*\w"):
        load_safetensors(path)


def test_what_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    for write in (True, False):
        with pytest.raises(ValueError, match=r"not as 'w\.bin'"):
            save_weights(tensors(), tmp_path / "w.bin", write=write)
    assert save_weights(tensors(), tmp_path / "w.pth", write=False) == tmp_path / "w.pth"
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"w\.pth cannot be written"):
        save_weights(tensors(), tmp_path / "file" / "w.pth")
