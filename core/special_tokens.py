"""The special tokens that a model folder names: `bos_token`, `eos_token` and the like.

Owns which of the two files that name them counts, as in transformers. Does not know where the files
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def special_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[str, str]:
    """Map each name to the token's text.

    `special_tokens_map.json` is the older file: it counts, unless `tokenizer_config.json`
    describes the added tokens itself (`added_tokens_decoder`). Both also name tokens of their own
    (`image_token`), the newer one in `extra_special_tokens`.
    """
    named = dict(tokenizer_config)
    if "added_tokens_decoder" not in named:
        named |= special_tokens_map
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    own = extra.keys() if isinstance(extra, dict) else ()
    return {
        name: text
        for name, token in named.items()
        if (name.endswith("_token") or name in own) and (text := _text(token)) is not None
    }


def _text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
