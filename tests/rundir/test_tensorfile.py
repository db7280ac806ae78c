"""Tensor files: what the library reads is what was given, piece by piece; nothing large is believed unchecked."""

from __future__ import annotations

import io
import json
import struct

import pytest
import safetensors.torch
import torch

from ddpm_lmk.rundir import checkpoint
from ddpm_lmk.rundir.checkpoint import parse, pieces, read
from ddpm_lmk.system.files import DamagedError


def test_the_library_reads_every_type_shape_and_layout_as_it_was() -> None:
    group = {
        f"{dtype}/{name}": value.to(dtype)
        for dtype in checkpoint.NAMES
        for name, value in {
            "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 4),
            "odd": torch.arange(3),
            "turned": torch.arange(6).reshape(2, 3).t(),
            "channels last": torch.arange(24).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        }.items()
    }
    data = b"".join(pieces(group))
    for found in (safetensors.torch.load(data), parse(data, "file")):
        assert found.keys() == group.keys()
        assert all(found[name].dtype == value.dtype for name, value in group.items())
        assert all(torch.equal(found[name], value) for name, value in group.items())


def test_a_file_is_the_one_the_library_writes() -> None:
    group = {"b": torch.ones(3), "a": torch.zeros(5, dtype=torch.uint8), "c": torch.ones(2, dtype=torch.float64)}
    assert b"".join(pieces(group)) == safetensors.torch.save(group)


def test_no_tensors_are_a_file_too() -> None:
    assert parse(b"".join(pieces({})), "file") == {}


def test_tensors_are_handed_out_without_a_copy() -> None:
    value = torch.zeros(4)
    _, piece = pieces({"a": value})
    value[0] = 1.0
    assert bytes(piece) == value.numpy().tobytes()


def file(header: dict[str, object], data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 a zip, as torch.save writes",
        b"\x80\x02}q\x00.",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 9 << 20) + b"{" + b" " * (9 << 20),
        file({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**62]}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}),
        file({"a": {"dtype": "PY", "shape": [4], "data_offsets": [0, 16]}}),
        file({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 20),
    ],
)
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError, match="not a safetensors file"):
        parse(data, "file")
    with pytest.raises(DamagedError, match="not a safetensors file"):
        read(io.BytesIO(data), len(data), "file")


@pytest.mark.parametrize("text", [b"[]", b"{}  ", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"[" * (1 << 20)])
def test_a_header_that_lists_other_than_the_file_is_refused_before_the_rest_is_read(text: bytes) -> None:
    file = io.BytesIO(struct.pack("<Q", len(text)) + text + b"\0" * 100)
    with pytest.raises(DamagedError, match="not a safetensors file"):
        read(file, 2**40, "file")
    assert file.tell() == 8 + len(text)
