// What users of JavaScript clients call, each as its own documentation shows it.
//
// Owns the calls and what each must give. Knows nothing of Baton but its address. Called by
// `benchmarks.clients` as `node node_calls.mjs URL KEY MODEL`; writes one JSON line for each call.

import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const [url, key, model] = process.argv.slice(2);
const question = "What is the capital of France?";
const answer = "The capital of France is Paris.";
const messages = [{ role: "user", content: question }];
const calls = [];

function call(client, what, make) {
  calls.push({ client, what, make });
}

function check(found, expected = answer) {
  if (JSON.stringify(found) !== JSON.stringify(expected)) {
    throw new Error(`${JSON.stringify(found)} in place of ${JSON.stringify(expected)}`);
  }
}

async function refused(promise, name) {
  try {
    await promise;
  } catch (error) {
    check(error.status ?? error.statusCode, 400);
    check(error.message.includes(name), true);
    return;
  }
  throw new Error("no error");
}

// --- openai ---------------------------------------------------------------------------------------

const plain = new OpenAI({ baseURL: url, apiKey: key });
const lookUp = {
  type: "function",
  function: { name: "look_up", parameters: { type: "object", properties: {} } },
};

call("openai", "chat", async () => {
  const reply = await plain.chat.completions.create({ model, messages, temperature: 0 });
  check(reply.choices[0].message.content);
});
call("openai", "chat, streamed", async () => {
  const stream = await plain.chat.completions.create({
    model,
    messages,
    temperature: 0,
    stream: true,
  });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  check(text);
});
call("openai", "the streaming helper (`chat.completions.stream`)", async () => {
  const stream = plain.chat.completions.stream({ model, messages, temperature: 0 });
  check(await stream.finalContent());
});
call("openai", "completion, several prompts and outputs", async () => {
  const reply = await plain.completions.create({ model, prompt: ["a", "b"], n: 2, max_tokens: 3 });
  check(
    reply.choices.map((choice) => choice.index),
    [0, 1, 2, 3],
  );
});
call("openai", "models", async () => {
  const names = [];
  for await (const found of plain.models.list()) names.push(found.id);
  check(names.includes(model), true);
});
call("openai", "an aborted stream", async () => {
  const stream = await plain.chat.completions.create({ model, messages, stream: true });
  for await (const _ of stream) break;
  stream.controller.abort();
});
call("openai", "tools are refused by name", () =>
  refused(plain.chat.completions.create({ model, messages, tools: [lookUp] }), "tools"),
);

// --- Vercel's AI SDK ------------------------------------------------------------------------------

const provider = createOpenAICompatible({ name: "baton", baseURL: url, apiKey: key });

call("ai", "`generateText`", async () => {
  const { text, usage } = await generateText({
    model: provider(model),
    prompt: question,
    temperature: 0,
  });
  check(text);
  check(usage.outputTokens > 0, true);
});
call("ai", "`streamText`", async () => {
  const { textStream } = streamText({ model: provider(model), prompt: question, temperature: 0 });
  let text = "";
  for await (const part of textStream) text += part;
  check(text);
});
call("ai", "`generateText` with a completion model", async () => {
  const { text } = await generateText({
    model: provider.completionModel(model),
    prompt: "Once upon a time",
    maxOutputTokens: 4,
  });
  check(text.length > 0, true);
});
call("ai", "tools are refused by name", () =>
  refused(
    generateText({
      model: provider(model),
      prompt: question,
      maxRetries: 0,
      tools: { look_up: tool({ inputSchema: jsonSchema({ type: "object", properties: {} }) }) },
    }),
    "tools",
  ),
);

for (const { client, what, make } of calls) {
  const manifest = new URL(`./node_modules/${client}/package.json`, import.meta.url);
  const { version } = JSON.parse(readFileSync(manifest, "utf8"));
  let fault = "";
  try {
    await make();
  } catch (error) {
    fault = `${error.name}: ${error.message}`.slice(0, 400);
  }
  console.log(JSON.stringify({ client: `${client} (Node)`, version, call: what, fault }));
}
