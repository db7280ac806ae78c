"""The safetensors format, written in pieces and read from memory.

The library's own writer makes a second copy of everything before the first byte can be hashed; `pieces` hands out the
memory of the tensors one after the other. The format: 8 bytes of header length, a JSON header of names, types, shapes
and byte ranges, padded to 8 bytes, then the tensors, widest type first so that each is aligned. Reading is the
library's, after the header's length was checked against the data and a limit.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_lmk.system.durable import DamagedError

LARGEST_HEADER = 8 << 20  # bytes, of about 100 per tensor; the library would take 100 MB and need a GB to parse it
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}


def pieces(group: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a file holding `group`; what is not contiguous on the host is copied when its turn comes."""
    ordered = sorted(group, key=lambda name: (-group[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in ordered:
        tensor = group[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in ordered:
        flat = group[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def parse(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a file's bytes; raises `DamagedError` for anything that is not a safetensors file."""
    _header_length(data[:8], len(data), name)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({error})") from None


def read(file: BinaryIO, size: int, name: str) -> dict[str, Tensor]:
    """The tensors of an open file of `size` bytes nobody vouches for; they are read only if they fill the file."""
    head, text, _ = _read_header(file, size, name)
    return parse(head + text + file.read(), name)


def header(file: BinaryIO, size: int, name: str) -> dict[str, Tensor]:
    """The tensors of an open file, as names, types and shapes: they lie on the device `meta`, nothing else is read."""
    _, _, entries = _read_header(file, size, name)
    try:
        return {
            key: torch.empty([int(side) for side in entry["shape"]], dtype=TYPES[entry["dtype"]], device="meta")
            for key, entry in entries.items()
        }
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({type(error).__name__} in its header)") from None


def _read_header(file: BinaryIO, size: int, name: str) -> tuple[bytes, bytes, dict[str, Any]]:
    """Length and text of the header, and its entries by name of tensor."""
    head = file.read(8)
    text = file.read(_header_length(head, size, name))
    try:
        entries = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        filled = 8 + len(text) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{name} is not a safetensors file ({type(error).__name__} in its header)") from None
    if filled != size:
        raise DamagedError(f"{name} is not a safetensors file: it has {size} bytes, its header lists {filled}")
    return head, text, entries


def _header_length(head: bytes, size: int, name: str) -> int:
    """What the first 8 bytes of a file of `size` bytes say."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise DamagedError(f"{name} is not a safetensors file: its header claims {length} bytes")
    return length
