"""OpenAI's client, unchanged: `python examples/quickstart_openai.py [URL]`.

Start a cluster first: `baton up --local`. The key is that of `OPENAI_API_KEY`; a cluster
without keys accepts any.
"""

import os
import sys

from openai import OpenAI


def main() -> None:
    """Ask one question and print the answer as it arrives."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
