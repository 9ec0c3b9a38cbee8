"""The tiny model behind a tokenizer with byte fallback, as SentencePiece's are when converted.

Owns the folder's making: 256 byte tokens, a few pieces of text, spaces as U+2581, a decoder that
takes a run of byte tokens as a whole, so that a later byte can turn a finished character into
U+FFFD.
"""

import json
import shutil
from pathlib import Path

TINY = Path(__file__).parents[2] / "models" / "baton-tiny"
SPECIAL = ("<unk>", "<s>", "</s>")
PIECES = ("▁", "t", "h", "▁t", "▁th")
FIRST_BYTE = len(SPECIAL)
PIECE_IDS = {piece: FIRST_BYTE + 256 + i for i, piece in enumerate(PIECES)}


def byte_id(byte):
    """Token id of one byte."""
    return FIRST_BYTE + byte


def write_folder(folder):
    """Copy the tiny model to `folder` and give it the tokenizer."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()), encoding="utf-8")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **ids}))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def _tokenizer():
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    vocabulary |= {f"<0x{byte:02X}>": byte_id(byte) for byte in range(256)}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    to_bar = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    prepend = {"type": "Prepend", "prepend": "▁"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "special": True, **dict.fromkeys(flags, False)}
            for i, name in enumerate(SPECIAL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, to_bar]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary | PIECE_IDS,
            "merges": [["▁", "t"], ["▁t", "h"]],
        },
    }
