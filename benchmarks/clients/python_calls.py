"""What users of Python clients call, each as its own documentation shows it.

Owns the calls and what each must give. Knows nothing of Baton but its address: runs in an
environment with the clients alone. Called by `benchmarks.clients` as
`python python_calls.py URL KEY MODEL`; writes one JSON line for each call.
"""

import asyncio
import importlib.metadata
import json
import sys

import instructor
import litellm
import openai
import pydantic
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

URL, KEY, MODEL = sys.argv[1:]
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
ASK = [{"role": "user", "content": QUESTION}]
LONG = "word " * 20_000
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}
CALLS = []


def call(client, what):
    """Register a function as a call of a client's."""

    def register(function):
        CALLS.append((client, what, function))
        return function

    return register


def check(found, expected=ANSWER):
    """The right value, or what came in its place."""
    if found != expected:
        raise AssertionError(f"{found!r} in place of {expected!r}")


def refused(error, name):
    """An error must name what it refuses."""
    if name not in str(error):
        raise AssertionError(f"{error!r} does not name {name}")


# --- openai ---------------------------------------------------------------------------------------

PLAIN = openai.OpenAI(base_url=URL, api_key=KEY)


@call("openai", "chat")
def openai_chat():
    reply = PLAIN.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    check(reply.choices[0].message.content)
    check(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens)


@call("openai", "chat, streamed with usage")
def openai_stream():
    chunks = list(
        PLAIN.chat.completions.create(
            model=MODEL,
            messages=ASK,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
    check(chunks[-1].usage.completion_tokens > 0, expected=True)


@call("openai", "completion, several prompts and outputs")
def openai_completion():
    reply = PLAIN.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=3)
    check([choice.index for choice in reply.choices], [0, 1, 2, 3])


@call("openai", "eight chats at once, async")
def openai_async():
    async def main():
        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY) as client:
            calls = (
                client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
                for _ in range(8)
            )
            return [reply.choices[0].message.content for reply in await asyncio.gather(*calls)]

    check(asyncio.run(main()), [ANSWER] * 8)


@call("openai", "models")
def openai_models():
    check(MODEL in [model.id for model in PLAIN.models.list()], expected=True)


@call("openai", "a wrong key is an AuthenticationError")
def openai_key():
    try:
        PLAIN.with_options(api_key="sk-wrong").models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("no error")


@call("openai", "tools are refused by name")
def openai_tools():
    try:
        PLAIN.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL])
    except openai.BadRequestError as error:
        return refused(error, "tools")
    raise AssertionError("no error")


@call("openai", "structured output (`parse`) is refused by name")
def openai_parse():
    class City(pydantic.BaseModel):
        name: str

    try:
        PLAIN.chat.completions.parse(model=MODEL, messages=ASK, response_format=City)
    except openai.BadRequestError as error:
        return refused(error, "response_format")
    raise AssertionError("no error")


@call("openai", "the Responses API is a 404 that says so")
def openai_responses():
    try:
        PLAIN.responses.create(model=MODEL, input=QUESTION)
    except openai.NotFoundError as error:
        return refused(error, "/v1/responses")
    raise AssertionError("no error")


@call("openai", "embeddings are a 404 that says so")
def openai_embeddings():
    try:
        PLAIN.embeddings.create(model=MODEL, input=QUESTION)
    except openai.NotFoundError as error:
        return refused(error, "/v1/embeddings")
    raise AssertionError("no error")


# --- LangChain ------------------------------------------------------------------------------------


def langchain_model():
    return ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0)


@call("langchain-openai", "`ChatOpenAI.invoke`")
def langchain_invoke():
    reply = langchain_model().invoke(QUESTION)
    check(reply.content)
    check(reply.usage_metadata["output_tokens"] > 0, expected=True)


@call("langchain-openai", "`ChatOpenAI.stream`")
def langchain_stream():
    check("".join(chunk.content for chunk in langchain_model().stream(QUESTION)))


@call("langchain-openai", "`ChatOpenAI.batch`")
def langchain_batch():
    check([reply.content for reply in langchain_model().batch([QUESTION] * 4)], [ANSWER] * 4)


@call("langchain-openai", "`ChatOpenAI.ainvoke`")
def langchain_async():
    check(asyncio.run(langchain_model().ainvoke(QUESTION)).content)


@call("langchain-openai", "`OpenAI.invoke` (completions)")
def langchain_completion():
    model = OpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=4)
    check(bool(model.invoke("Once upon a time")), expected=True)


@call("langchain-openai", "`bind_tools` is refused by name")
def langchain_tools():
    try:
        langchain_model().bind_tools([TOOL]).invoke(QUESTION)
    except openai.BadRequestError as error:
        return refused(error, "tools")
    raise AssertionError("no error")


# --- LiteLLM --------------------------------------------------------------------------------------

ROUTE = {"api_base": URL, "api_key": KEY}


@call("litellm", "`completion`")
def litellm_chat():
    reply = litellm.completion(f"openai/{MODEL}", ASK, temperature=0, **ROUTE)
    check(reply.choices[0].message.content)


@call("litellm", "`completion`, streamed")
def litellm_stream():
    chunks = litellm.completion(f"openai/{MODEL}", ASK, temperature=0, stream=True, **ROUTE)
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@call("litellm", "`acompletion`")
def litellm_async():
    reply = asyncio.run(litellm.acompletion(f"openai/{MODEL}", ASK, temperature=0, **ROUTE))
    check(reply.choices[0].message.content)


@call("litellm", "`text_completion`")
def litellm_completion():
    reply = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="Once upon a time", max_tokens=4, **ROUTE
    )
    check(bool(reply.choices[0].text), expected=True)


@call("litellm", "a prompt that is too long is a ContextWindowExceededError")
def litellm_context():
    long = [{"role": "user", "content": LONG}]
    try:
        litellm.completion(f"openai/{MODEL}", long, **ROUTE)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no error")


# --- LlamaIndex -----------------------------------------------------------------------------------


def llama_model():
    return OpenAILike(
        model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, temperature=0, max_tokens=32
    )


@call("llama-index-llms-openai-like", "`chat`")
def llama_chat():
    check(llama_model().chat([ChatMessage(role="user", content=QUESTION)]).message.content)


@call("llama-index-llms-openai-like", "`stream_chat`")
def llama_stream():
    chunks = llama_model().stream_chat([ChatMessage(role="user", content=QUESTION)])
    check("".join(chunk.delta or "" for chunk in chunks))


@call("llama-index-llms-openai-like", "`achat`")
def llama_async():
    message = ChatMessage(role="user", content=QUESTION)
    check(asyncio.run(llama_model().achat([message])).message.content)


@call("llama-index-llms-openai-like", "`complete`")
def llama_complete():
    check(llama_model().complete(QUESTION).text)


# --- instructor -----------------------------------------------------------------------------------


class City(pydantic.BaseModel):
    """What the tiny model cannot write: it knows no JSON."""

    name: str


@call("instructor", "text mode reaches the model; what it wrote is judged by instructor")
def instructor_text():
    client = instructor.from_openai(PLAIN, mode=instructor.Mode.MD_JSON)
    try:
        client.chat.completions.create(
            model=MODEL, messages=ASK, response_model=City, max_retries=0, max_tokens=16
        )
    except (InstructorRetryException, IncompleteOutputException) as error:
        check(error.last_completion.choices[0].finish_reason in ("stop", "length"), expected=True)


@call("instructor", "tool mode is refused by name")
def instructor_tools():
    client = instructor.from_openai(PLAIN, mode=instructor.Mode.TOOLS)
    try:
        client.chat.completions.create(
            model=MODEL, messages=ASK, response_model=City, max_retries=0
        )
    except (InstructorRetryException, openai.BadRequestError) as error:
        return refused(error, "tool")
    raise AssertionError("no error")


def main():
    """Make every call; one line each, whatever becomes of it."""
    litellm.suppress_debug_info = True
    for client, what, function in CALLS:
        fault = ""
        try:
            function()
        except Exception as error:  # whatever a client raises is the finding
            fault = f"{type(error).__name__}: {error}"[:400]
        version = importlib.metadata.version(client)
        line = {"client": client, "version": version, "call": what, "fault": fault}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
