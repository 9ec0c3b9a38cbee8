"""A tokenizer in this process, for tests of what stands in front of it or behind it."""

from core.errors import InvalidRequest
from router.text.text_bounds import check_bytes

BOS = 1
REFUSED_TEXT = "a text that the tokenizer refuses"


class ByteTokenizer:
    """One token for each byte of UTF-8; special are only the first one's, `BOS`."""

    async def encode(self, text, *, adds_special_tokens=True, tenant="", max_bytes=0):
        check_bytes(text, max_bytes)
        if text == REFUSED_TEXT:
            raise InvalidRequest("prompt", "took too long")
        try:
            return [BOS] * adds_special_tokens + list(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest("prompt", "has a lone surrogate") from error

    async def encode_with_tokens(self, text, *, adds_special_tokens, tenant=""):
        ids = await self.encode(text, adds_special_tokens=adds_special_tokens)
        return ids, [str(i) for i in ids]

    async def encode_chat(self, chat, *, tenant="", max_bytes=0):
        try:
            text = "".join(message["content"] for message in chat.messages)
        except (KeyError, TypeError) as error:
            raise InvalidRequest("messages", "have no text") from error
        return await self.encode(text, adds_special_tokens=False, max_bytes=max_bytes)
