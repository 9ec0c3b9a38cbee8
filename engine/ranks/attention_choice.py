"""Which attention backend the ranks of a worker use.

Owns the choice and its refusals, before a process starts. Does not know torch.
"""

import importlib.util

from core.config import EngineConfig
from core.errors import ConfigError


def attention_of(engine: EngineConfig) -> str:
    """Name the backend of `engine.model` that the settings ask for.

    Raises:
        ConfigError: It cannot run on the device.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if engine.attention == "auto":
        return "cpu" if engine.device == "cpu" else "triton" if has_triton else "gathered"
    if engine.attention == "cpu" and engine.device != "cpu":
        raise ConfigError(
            f"engine.attention cpu cannot read a pool on {engine.device}; "
            "use auto, triton, gathered or dense"
        )
    if engine.attention == "triton" and (engine.device == "cpu" or not has_triton):
        why = "needs engine.device cuda" if engine.device == "cpu" else "needs the package triton"
        raise ConfigError(f"engine.attention triton {why}; use auto")
    return engine.attention
