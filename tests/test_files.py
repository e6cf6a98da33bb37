"""Files of tensors: what is damaged is told, whichever format and whoever reads it."""

import pytest
import torch
from torch.serialization import set_crc32_options

from landscape import polar_trajectory
from landscape._files import load_tensors
from landscape.models import load_reference_checkpoint

STATE = {"weight": torch.arange(1000.0)}


def changed(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(
    "read",
    [
        load_tensors,
        lambda path: polar_trajectory([STATE, path]),
        lambda path: load_reference_checkpoint(path, "vit_ti"),
    ],
    ids=["load_tensors", "probes", "load_reference_checkpoint"],
)
def test_a_changed_byte_is_told(tmp_path, read):
    path = tmp_path / "epoch-1.pt"
    torch.save(STATE, path)
    changed(path, STATE["weight"].numpy().tobytes(), (STATE["weight"] + 1).numpy().tobytes())
    with pytest.raises(ValueError, match="checksum of epoch-1/data/0 is wrong"):
        read(path)


def test_a_changed_directory_is_told(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] = 8  # stored is called deflated
    path.write_bytes(content)
    with pytest.raises(ValueError, match="decompressing"):
        load_tensors(path)


@pytest.mark.parametrize("mapped", [False, True])
def test_files_without_checksums_are_read(tmp_path, mapped):
    path = tmp_path / "state.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(path, mapped=mapped)["weight"], STATE["weight"])
    set_crc32_options(False)
    try:
        torch.save(STATE, path)
    finally:
        set_crc32_options(True)
    assert torch.equal(load_tensors(path, mapped=mapped)["weight"], STATE["weight"])


def test_damage_of_the_older_format_is_told(tmp_path):
    path = tmp_path / "state.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    key = str(STATE["weight"].untyped_storage()._cdata).encode()
    content = path.read_bytes()
    path.write_bytes(content.replace(key, key[::-1], 1))
    with pytest.raises(ValueError, match="storage key"):
        load_tensors(path, mapped=True)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nothing.pt")
