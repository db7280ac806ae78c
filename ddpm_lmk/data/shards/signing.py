"""Who made a pack: `manifest.sig`, an HMAC-SHA256 of the manifest under a key of your own.

The manifest holds the digests of the index and of every shard, so a signature covers them all. A digest alone finds
damage, not malice: who changes a shard can write a manifest that fits. Where `LMK_SIGNING_KEY` names a key file, every
pack has to be signed with it, before anything else of it is read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from ddpm_lmk.data.sources.ids import secret_key
from ddpm_lmk.errors import CheckpointError
from ddpm_lmk.system.files import write_text

FILE_NAME = "manifest.sig"
VARIABLE = "LMK_SIGNING_KEY"


def sign(root: Path, key_file: Path) -> Path:
    """Write the signature of a pack; the key file is made where there is none, for its owner only.

    Raises:
        ConfigError, ResourceError: see `ids.secret_key`; the folder cannot be written.
    """
    content = (root / "manifest.json").read_bytes()
    write_text(root / FILE_NAME, _signature(content, secret_key(key_file)) + "\n")
    return root / FILE_NAME


def is_wanted() -> bool:
    """Do packs have to be signed?"""
    return bool(os.environ.get(VARIABLE))


def check(root: Path, content: bytes) -> None:
    """Raise CheckpointError where a signature is wanted and `content` (of manifest.json) has another, or none."""
    if not is_wanted():
        return
    path = root / FILE_NAME
    remedy = f"use packs from those who hold the key, or unset {VARIABLE}"
    if not Path(os.environ[VARIABLE]).is_file():
        raise CheckpointError(f"{VARIABLE} names {os.environ[VARIABLE]}, which is no file; packs cannot be checked")
    if not path.is_file():
        raise CheckpointError(f"{root} is not signed, but {VARIABLE} is set; {remedy}")
    wanted = _signature(content, secret_key(Path(os.environ[VARIABLE])))
    if not hmac.compare_digest(path.read_bytes().strip(), wanted.encode("ascii")):
        raise CheckpointError(f"{root} was not signed with your key, or changed since; {remedy}")


def _signature(content: bytes, key: bytes) -> str:
    return hmac.new(key, b"ddpm-lmk pack\0" + content, hashlib.sha256).hexdigest()
