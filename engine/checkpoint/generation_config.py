"""What a model's makers recommend: default sampling, and the tokens that end an output.

Owns `generation_config.json`, each value checked by type and range, and the union of the end tokens
that it, `config.json` and the tokenizer's files name: fine-tunes often correct only one of the
three. Does not know tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest, ModelLoadError
from core.special_tokens import special_tokens
from core.types import MODEL_DEFAULTS, SamplingParams
from engine.checkpoint.json_file import read_json, read_json_if_there

GENERATION_CONFIG = "generation_config.json"


def default_sampling(generation: Mapping[str, Any], vocabulary_size: int) -> dict[str, float]:
    """Sampling fields that the makers set, by our own names; what turns a field off is left out.

    Raises:
        ModelLoadError: A value has the wrong type or range; names file and field.
    """
    found: dict[str, float] = {}
    for name in MODEL_DEFAULTS:
        if value := _number(generation, name):
            found[name] = value
    top_k = generation.get("top_k")
    if top_k is not None and (limit := _whole(GENERATION_CONFIG, "top_k", top_k)) > 0:
        # Some write more than the vocabulary has and mean all of it; our own limits refuse that.
        found["top_k"] = min(limit, vocabulary_size)
    try:
        SamplingParams(**found).validate(vocabulary_size)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise ModelLoadError(f"{GENERATION_CONFIG}: {error.message}") from error
    return found


def end_tokens(
    generation: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> tuple[int, ...]:
    """Ids of the tokens that end an output, each once.

    Raises:
        ModelLoadError: A value is no token id; names file and field.
    """
    ids: list[int] = []
    for file, tree in ((GENERATION_CONFIG, generation), ("config.json", config)):
        value = tree.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids += [_whole(file, "eos_token_id", one, least=0) for one in values]
    return tuple(dict.fromkeys([*ids, *_tokenizer_end(folder)]))


def _tokenizer_end(folder: Path) -> list[int]:
    """The id of the tokenizer's own `eos_token`, if it has one."""
    config = read_json_if_there(folder / "tokenizer_config.json")
    older = read_json_if_there(folder / "special_tokens_map.json")
    text = special_tokens(config, older).get("eos_token")
    path = folder / "tokenizer.json"
    if not text or not path.exists():
        return []
    tree = read_json(path)
    try:
        # Added tokens come before those of the vocabulary, as in `tokenizers`.
        added = {token["content"]: token["id"] for token in tree.get("added_tokens") or ()}
        vocabulary = tree["model"]["vocab"]
        found = added.get(text)
        if found is None and isinstance(vocabulary, dict):
            found = vocabulary.get(text)
        elif found is None:
            # A Unigram vocabulary is a list of pieces and scores; the place is the id.
            found = next((i for i, (piece, _) in enumerate(vocabulary) if piece == text), None)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder.name}/tokenizer.json is malformed: {error!r}") from error
    return [] if found is None else [_whole("tokenizer.json", f"id of {text!r}", found, least=0)]


def _number(generation: Mapping[str, Any], name: str) -> float | None:
    """Read a number; None where there is none."""
    value = generation.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise ModelLoadError(f"{GENERATION_CONFIG} has {name} = {value!r:.60}, must be a number")


def _whole(file: str, name: str, value: object, least: int | None = None) -> int:
    """Read a whole number: some writers store 50 as 50.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, int) or not is_whole or (least is not None and value < least):
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        raise ModelLoadError(f"{file} has {name} = {value!r:.60}, must be {wanted}")
    return value
