"""What people import: the client of a cluster, what it sends, what it raises, and the version.

Owns these names and nothing else; the code is in `client`, the messages are those of
protos/baton/v1/generation.proto. Does not know servers.

    from baton import Client, GenerateRequest, errors

    async with Client(["10.0.0.1:9000", "10.0.0.2:9000"]) as client:
        try:
            async for message in client.generate(GenerateRequest(text="Once upon a time")):
                print(message.delta.text, end="")
        except errors.Unavailable as error:
            print(f"try again in {error.retry_after_s} s")
"""

from importlib.metadata import version

from baton import errors
from client.stream import Client
from protos.baton.v1.generation_pb2 import (
    ChatMessage,
    ChatRequest,
    GenerateRequest,
    ResponseOptions,
    SamplingOptions,
    StoppingOptions,
)

__version__ = version("baton-serve")

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "Client",
    "GenerateRequest",
    "ResponseOptions",
    "SamplingOptions",
    "StoppingOptions",
    "__version__",
    "errors",
]
