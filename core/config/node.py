"""What every group of settings has in common.

Owns frozen groups, their refusal of unknown keys, and the types of several settings. Does not know
which settings there are.

A boolean is an adjective (`router.strict`) or what the component is to do
(`router.log_requests`), true meaning yes: no `is_`, `has_`, `enable_` or `no_`.
"""

from __future__ import annotations

from typing import Annotated, Any, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PORT = 65_535
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Node(BaseModel):
    """A frozen group of settings; unknown keys are errors, and no error quotes a value."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_lists(cls, tree: Any) -> Any:  # noqa: ANN401 - whatever somebody wrote
        """A list may be one string, as environment variables are: `shm,grpc`."""
        # Pydantic refuses it, in words that name the group.
        if not isinstance(tree, dict):
            return tree
        lists = {
            name
            for name, field in cls.model_fields.items()
            if get_origin(field.annotation) is tuple
        }
        return {
            name: [part.strip() for part in value.split(",")]
            if name in lists and isinstance(value, str)
            else value
            for name, value in tree.items()
        }
