"""Reads one request's events and checks their order.

Owns the rule: positions without gap or repeat, each choice finished at most once, one ending, last.
"""

from core.types import ChoiceFinished, RequestEnded, TextDelta


def read_events(events):
    """Return the tokens by choice; fails on any disorder."""
    tokens, finished = {}, set()
    for index, event in enumerate(events):
        match event:
            case TextDelta(choice, position, token_ids):
                seen = tokens.setdefault(choice, [])
                assert position == len(seen) and choice not in finished, (event, seen)
                seen += token_ids
            case ChoiceFinished(choice):
                assert choice not in finished, event
                finished.add(choice)
            case RequestEnded():
                assert index == len(events) - 1, "ended before its last event"
    assert events and isinstance(events[-1], RequestEnded), "no terminal event"
    return {choice: tuple(ids) for choice, ids in tokens.items()}
