"""What a tokenizer's process answers."""

from support.models import TINY

from router.text.chat_template import ChatTemplates
from router.text.tokenizer_child import answer

TALK = [{"role": "user", "content": " Hi "}]


def test_the_tokenizer_child_answers_orders():
    from tokenizers import Tokenizer

    tokenizer, templates = Tokenizer.from_file(str(TINY / "tokenizer.json")), ChatTemplates(TINY)
    assert answer({"text": "ab", "adds_special_tokens": False}, tokenizer, templates, 99)[
        "ids"
    ] == [97, 98]
    both = answer(
        {"text": "ab", "adds_special_tokens": False, "wants_tokens": True}, tokenizer, templates, 99
    )
    assert both == {"ids": [97, 98], "tokens": ["a", "b"]}
    order = {
        "messages": TALK,
        "variables": {},
        "template": "{{ messages[0].content }}",
        "adds_generation_prompt": True,
        "continues_final": False,
        "adds_special_tokens": False,
    }
    assert answer(order, tokenizer, templates, 99)["ids"] == [32, 72, 105, 32]
