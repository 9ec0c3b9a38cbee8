"""Where a model's files are: a local folder, the repository's tiny model, or a hub id.

Owns that decision and the download. Does not know what the files mean.
"""

from __future__ import annotations

import re
from pathlib import Path

from core.config import ModelConfig
from core.errors import ModelLoadError
from engine.checkpoint.safetensors_files import WHOLE, weight_files

TINY_MODEL = Path(__file__).parent / "models" / "baton-tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DESCRIPTIONS = ["*.json", "*.jinja"]


def model_folder(config: ModelConfig) -> Path:
    """Find the folder, downloading it if `path` is a hub id.

    Raises:
        ModelLoadError: It is neither a folder nor a hub id that can be downloaded.
    """
    if not config.path:
        return TINY_MODEL
    folder = Path(config.path).expanduser()
    if folder.exists():
        return folder
    if not HUB_ID.fullmatch(config.path):
        raise ModelLoadError(f"model.path is {config.path}, which is neither a folder nor a hub id")
    return _from_hub(config.path, config.revision)


def _from_hub(hub_id: str, revision: str) -> Path:
    import httpx  # noqa: PLC0415 - the hub client and its transport are only loaded when needed
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        wanted = [*DESCRIPTIONS, WHOLE]
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
        if not (folder / WHOLE).is_file():  # the index says which shards; the folder is a commit's
            shards = weight_files(folder)
            snapshot_download(hub_id, revision=folder.name, allow_patterns=shards)
        return folder
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"model {hub_id} is no local folder, not in the hub cache, and the hub cannot be "
            "reached; set model.path to a folder"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        raise ModelLoadError(
            f"model {hub_id} at {revision} cannot be downloaded from the hub: {error}"
        ) from error
