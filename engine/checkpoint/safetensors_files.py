"""Which safetensors files hold a model, and what they claim to hold, read without torch.

Owns the choice of files, their headers (names, shapes), checked against their size, and the
fingerprint of the weights. Does not know which tensors a model needs.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

from core.errors import ModelLoadError
from engine.checkpoint.json_file import read_json

MAX_HEADER_BYTES = 100 << 20
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_NAME = re.compile(r"[\w.-]+\.safetensors")


def weight_files(folder: Path) -> list[str]:
    """Name the files that hold the model; they need not be there.

    The choice is that of transformers: the whole model if it is there, else the shards of the
    index. Others (`consolidated.safetensors`, adapters) are other forms of the model.

    Raises:
        ModelLoadError: Neither, or a malformed index.
    """
    return sorted(set(_places(folder).values())) or [WHOLE]


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map every tensor to its file and shape, over all shards.

    Raises:
        ModelLoadError: A file is missing or damaged, or a tensor is not where the index places it.
    """
    places = _places(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(set(places.values())) or [WHOLE]:
        if not (folder / file).is_file():
            raise ModelLoadError(f"{folder.name} lacks {file}, which {INDEX} names")
        for tensor, shape in _read_header(folder / file).items():
            # Shards may repeat a tensor: the index says which one counts.
            if places.get(tensor, file) == file:
                found[tensor] = (file, shape)
    lost = next((tensor for tensor in places if tensor not in found), None)
    if lost is not None:
        raise ModelLoadError(f"{places[lost]} lacks tensor {lost}, which {INDEX} places there")
    return found


def _places(folder: Path) -> dict[str, str]:
    """Map every tensor to its shard; empty for a model in one file."""
    if (folder / WHOLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelLoadError(
            f"{folder.name} holds no {WHOLE} and no {INDEX}"
            + (f" (but {', '.join(others[:4])})" if others else "")
            + "; other weight formats are not read"
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelLoadError(f"{folder.name}/{INDEX} has no weight_map")
    for tensor, file in places.items():
        # No separators: an index must not lead out of its folder.
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise ModelLoadError(
                f"{folder.name}/{INDEX} places {tensor} in {str(file)[:80]!r}, "
                "which is not the name of a safetensors file"
            )
    return places


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        # The length is what the file claims: checked before so much is read.
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelLoadError(
                f"{path.name} is not a safetensors file: its header claims {length} of {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(info["shape"]) for name, info in header.items()}
            end = max((info["data_offsets"][1] for info in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{path.name} has a malformed safetensors header: {error}"
            ) from error
    # A download that broke off shows here, and not as noise in the last tensor.
    if 8 + length + end != size:
        raise ModelLoadError(
            f"{path.name} has {size} bytes, its header describes {8 + length + end}; "
            "it is truncated or damaged"
        )
    return shapes


def weights_digest(folder: Path, files: list[str]) -> str:
    """Fingerprint of the weights: headers, sizes, and the first and last MiB of every file."""
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=8)
    for name in files:
        path = folder / name
        digest.update(f"{name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            # Not all of it: 100 GB would take minutes at each start.
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()
