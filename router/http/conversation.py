"""Messages of a chat as clients send them, and as the chat template gets them.

Owns the forms of a message's content, and what a request may pass to the template. Does not know
sampling or replies.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from core.errors import InvalidRequest
from core.types import ChatPrompt
from router.http.body_model import Body, Many

MAX_ROLE_CHARACTERS = 64


class ContentPart(BaseModel):
    """One part of a message's content: text is served."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None

    @property
    def words(self) -> str | None:
        """What the part says; None: it is no text. OpenAI's APIs have several names for text."""
        if self.type == "refusal":
            return self.refusal
        return self.text if self.type in ("text", "input_text", "output_text") else None


class Message(BaseModel):
    """One turn; further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")
    role: StrictStr = Field(
        description="system, developer, user, assistant, tool, or what the template knows"
    )
    content: StrictStr | Many[ContentPart] | None = Field(
        None, description="text, or parts of type text, input_text, output_text or refusal"
    )

    def plain(self, index: int) -> dict[str, Any]:
        """As the template gets it."""
        if not self.role or len(self.role) > MAX_ROLE_CHARACTERS:
            raise InvalidRequest(
                f"messages[{index}].role", f"must have 1 to {MAX_ROLE_CHARACTERS} characters"
            )
        content: Any = self.content
        if isinstance(content, list):
            # Refused, not dropped: an answer that has not seen the picture would be wrong without a
            # word.
            odd = next((part.type for part in content if part.words is None), None)
            if odd is not None:
                raise InvalidRequest(
                    f"messages[{index}].content",
                    f"has a part of type {odd[:20]!r}; only text is served",
                )
            content = [{"type": "text", "text": part.words} for part in content]
        # Other fields go on: templates know tool calls, names and more that no list here could keep
        # up with.
        return {"role": self.role, "content": content, **(self.model_extra or {})}


class Conversation(Body):
    """Messages and how the chat template is used."""

    messages: Many[Message] = Field(description="at least one")
    add_generation_prompt: StrictBool | None = Field(
        None, description="open the assistant's turn; default true"
    )
    continue_final_message: StrictBool | None = Field(
        None, description="go on with the last message"
    )
    chat_template: StrictStr | None = Field(
        None, description="only with router.trust_request_chat_template"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="names in router.chat_template_kwargs"
    )
    reasoning_effort: StrictStr | None = Field(None, description="passed to the chat template")

    def chat(
        self, allowed: tuple[str, ...], *, trusts_template: bool, adds_special_tokens: bool
    ) -> ChatPrompt:
        """Check what may be passed to the template."""
        if not self.messages:
            raise InvalidRequest("messages", "is empty; send at least one")
        if self.chat_template is not None and not trusts_template:
            raise InvalidRequest(
                "chat_template", "is not allowed here; set router.trust_request_chat_template"
            )
        continues = bool(self.continue_final_message)
        if continues and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message", "and add_generation_prompt exclude each other"
            )
        variables = dict(self.chat_template_kwargs or {})
        # Variables reach into the template: the operator says which ones may.
        unknown = sorted(variables.keys() - set(allowed))
        if unknown:
            raise InvalidRequest(
                "chat_template_kwargs", f"has {unknown[0][:40]!r}; allowed: {', '.join(allowed)}"
            )
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        adds = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return ChatPrompt(
            [message.plain(index) for index, message in enumerate(self.messages)],
            variables,
            self.chat_template or "",
            adds_generation_prompt=adds,
            continues_final=continues,
            adds_special_tokens=adds_special_tokens,
        )
