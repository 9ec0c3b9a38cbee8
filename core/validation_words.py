"""What is wrong with a value, in Baton's words, where pydantic has found it.

Owns a sentence's end for each kind of error: it stands after the name of a setting or a field. Does
not know which there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

WHOLE = "must be a whole number"
NUMBER = "must be a number"
TRUTH = "must be true or false"
TEXT = "must be text"
GROUP = "must be a group of names and values"
LIST = "must be a list"
WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_type": WHOLE,
    "int_parsing": WHOLE,
    "int_parsing_size": WHOLE + " of fewer digits",
    "int_from_float": WHOLE,
    "float_type": NUMBER,
    "float_parsing": NUMBER,
    "bool_type": TRUTH,
    "bool_parsing": TRUTH,
    "string_type": TEXT,
    "string_unicode": "must be valid Unicode",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "none_required": "must be null",
    "model_type": GROUP,
    "model_attributes_type": GROUP,
    "dict_type": GROUP,
    "list_type": LIST,
    "tuple_type": LIST,
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def words_of(error: ErrorDetails) -> str:
    """Say what is wrong, without the value; a validator's own words stay as they are."""
    if error["type"] in WORDS:
        return WORDS[error["type"]].format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ")
