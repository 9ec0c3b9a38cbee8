"""What the safetensors files of a folder claim to hold, read without torch and checked against their size.

Owns the headers (names, shapes) and the fingerprint of the weights. Does not know which tensors a
model needs. Called by `engine.model_spec`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from core.errors import ModelLoadError

MAX_HEADER_BYTES = 100 << 20


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map every tensor to its file and shape, over all shards.

    Raises:
        ModelLoadError: No file, a damaged one, or a tensor that is there twice.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(
            f"{folder.name} holds no *.safetensors file; other weight formats are not read"
        )
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        for tensor, shape in _read_header(folder / file).items():
            if tensor in found:
                raise ModelLoadError(f"tensor {tensor} is in {found[tensor][0]} and in {file}")
            found[tensor] = (file, shape)
    return found


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelLoadError(
                f"{path.name} is not a safetensors file: its header claims {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
            shapes = {
                name: tuple(info["shape"])
                for name, info in header.items()
                if name != "__metadata__"
            }
            end = max(
                (
                    info["data_offsets"][1]
                    for name, info in header.items()
                    if name != "__metadata__"
                ),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path.name} has a malformed safetensors header: {error}"
            ) from error
    if 8 + length + end != size:
        raise ModelLoadError(
            f"{path.name} has {size} bytes, its header describes {8 + length + end}; it is truncated or damaged"
        )
    return shapes


def weights_digest(folder: Path, files: list[str]) -> str:
    """Fingerprint of the weights: headers, sizes, and the first and last MiB of every file."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for name in files:
        path = folder / name
        digest.update(f"{name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()
