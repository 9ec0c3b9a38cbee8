"""What all bodies of the HTTP server have in common: kinds of values, unknown fields, errors.

Owns the base model and the way from a JSON object to a body, or to the error that names the first
wrong field. Does not know any field.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from core.errors import InvalidRequest
from core.validation_words import words_of


def _whole(value: object) -> object:
    """Some clients write every number as a float: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = StrictFloat | StrictInt
Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""One wrong item is enough to say: errors are not collected."""
AnyBody = TypeVar("AnyBody", bound=BaseModel)


class Body(BaseModel):
    """Base of all bodies: unknown fields are kept, sorted later; no error quotes a value."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


def parse_body(kind: type[AnyBody], body: dict[str, Any]) -> AnyBody:
    """Validate a body.

    Raises:
        InvalidRequest: Names the first wrong field.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["loc"][:2] == ("prompt", "str"):  # none of its forms, of which this is the first
            forms = kind.model_fields["prompt"].description
            raise InvalidRequest("prompt", f"must be {forms}") from error
        raise InvalidRequest(_location(first["loc"]), words_of(first)) from error
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deeply") from error


def _location(parts: tuple[str | int, ...]) -> str:
    """`messages[0].role`; what names a branch of a union is left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not text:
            text = part
        elif (
            part.replace("_", "").isalnum()
            and part.islower()
            and part not in ("str", "int", "float", "bool")
        ):
            text += f".{part}"
    return text[:120] or "body"
