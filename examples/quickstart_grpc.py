"""Baton's own client over gRPC: `python examples/quickstart_grpc.py [ADDRESS ...]`.

Start a cluster first: `baton up --local`. With several routers, list them all: when one dies, the
stream continues at the next, and no token is lost or repeated.
"""

import asyncio
import os
import sys

from baton import ChatMessage, ChatRequest, Client, ResponseOptions, SamplingOptions, errors


async def ask(addresses: list[str], question: str) -> None:
    """Print the answer as it arrives, then its cost."""
    request = ChatRequest(
        messages=[ChatMessage(role="user", content=question)],
        sampling=SamplingOptions(temperature=0),  # greedy; without it, the model's default applies
        response=ResponseOptions(timing=True),
    )
    async with Client(addresses, api_key=os.environ.get("OPENAI_API_KEY", "")) as client:
        async for message in client.chat(request, timeout_s=30):
            match message.WhichOneof("event"):
                case "delta":
                    print(message.delta.text, end="", flush=True)
                case "summary":
                    usage, timing = message.summary.usage, message.summary.timing
                    print(
                        f"\n{usage.completion_tokens} tokens, "
                        f"TTFT {timing.ttft_s * 1e3:.1f} ms, path {timing.path}"
                    )


def main() -> None:
    """Ask one question; an error names what is wrong, and when to try again."""
    try:
        asyncio.run(ask(sys.argv[1:] or ["127.0.0.1:9000"], "What is the capital of France?"))
    except errors.InvalidRequest as error:
        raise SystemExit(f"{error.field} is wrong: {error}") from error
    except errors.Unavailable as error:
        raise SystemExit(f"{error}; try again in {error.retry_after_s:.0f} s") from error
    except errors.ServingError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
