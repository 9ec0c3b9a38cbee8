"""How many bytes of text one token can cover at most, if the tokenizer allows such a bound.

Owns the proof from `tokenizer.json`: a text that cannot fit is refused without being tokenized.
Does not know requests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import PromptTooLong
from router.text.detokenizing import TextModel

NFC_SHRINKS_BY = 3
"""At most: no character composes from more than three times its UTF-8 bytes."""
KEEPING_NORMALIZERS = {"NFC": NFC_SHRINKS_BY, "Prepend": 1}
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Metaspace")


def longest_token_bytes(folder: Path) -> int | None:
    """Return how many bytes of text one token covers at most; None if there is no bound.

    Only byte-level BPE and BPE with byte fallback have one, and only if their earlier steps drop
    nothing: unknown words, stripped spaces and folded case have no such bound.
    """
    tree: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = _kinds(tree.get("pre_tokenizer"), "pretokenizers")
    is_byte_level = any(kind["type"] == "ByteLevel" for kind in kinds)
    model = tree.get("model") or {}
    is_whole = model.get("type") == "BPE" and (is_byte_level or model.get("byte_fallback") is True)
    if not is_whole or any(not _keeps_all(kind) for kind in kinds):
        return None
    shrinks_by = 1
    for kind in _kinds(tree.get("normalizer"), "normalizers"):
        factor = KEEPING_NORMALIZERS.get(kind["type"])
        if kind == {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            factor = 1
        if factor is None:
            return None
        shrinks_by *= factor
    added = tree.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None  # such a token swallows all spaces beside it
    text = TextModel(folder)
    sizes = [len(text.token_bytes(i)) for i in (model.get("vocab") or {}).values()]
    sizes += [len(str(token["content"]).encode()) for token in added]
    return max(sizes, default=1) * shrinks_by


def check_bytes(text: str, max_bytes: int) -> None:
    """Refuse a text with more bytes than the context window can hold; 0: no limit.

    Raises:
        PromptTooLong: Nothing was tokenized.
    """
    if max_bytes and (num_bytes := len(text.encode("utf-8", "surrogatepass"))) > max_bytes:
        raise PromptTooLong(
            f"the prompt has {num_bytes} bytes and cannot fit: the context window holds at most "
            f"{max_bytes}, however they are tokenized; shorten it"
        )


def _kinds(node: dict[str, Any] | None, many: str) -> list[dict[str, Any]]:
    """Flatten a step or a sequence of steps."""
    if node is None:
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [kind for step in node.get(many, ()) for kind in _kinds(step, many)]


def _keeps_all(kind: dict[str, Any]) -> bool:
    return kind["type"] in KEEPING_PRE_TOKENIZERS and kind.get("behavior") != "Removed"
