"""Whole files or none: a reader never sees half of a result.

Small outputs (JSON, CSV, HTML, PNG) are written under a temporary name in the same folder, flushed to the disk and
renamed. Checkpoints, which are folders with checksums, are `durable`'s.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ddpm_lmk.errors import ResourceError
from ddpm_lmk.system import privacy
from ddpm_lmk.system.failpoints import reach


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one move; ResourceError when the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            reach("output.begin")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, privacy.file_mode())
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                reach("output.written")
                os.fsync(file.fileno())
            reach("output.flushed")
            temporary.replace(path)
            reach("output.renamed")
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; free or unlock the disk and run again") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_utf8(text: str) -> bytes:
    """UTF-8 that every reader takes.

    A name that is no UTF-8 on the disk comes with lone surrogates; each is written as `\\udcff`, which in JSON is the
    character again, and elsewhere is legible.
    """
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, content: str) -> None:
    """Put text at `path` in one move, as `to_utf8`."""
    write_bytes(path, to_utf8(content))


def write_json(path: Path, content: Any) -> None:
    """Put `content` at `path` as indented JSON in one move; NaN and infinities are a bug and raise ValueError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
