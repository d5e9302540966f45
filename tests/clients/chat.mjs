// What the npm package `openai` makes of a server: node chat.mjs BASE_URL. Prints one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const question = [{ role: "user", content: "What is 3 plus 4?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "add",
      description: "adds two numbers",
      parameters: {
        type: "object",
        properties: { a: { type: "integer", enum: [3, 7] }, b: { type: "integer", enum: [4] } },
        required: ["a", "b"],
        additionalProperties: false,
      },
    },
  },
];

async function streamed() {
  const stream = await client.chat.completions.create({
    model: "default",
    messages: question,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  let finish = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  return { text, finish, usage };
}

async function toolCall() {
  const answer = await client.chat.completions.create({
    model: "default",
    messages: question,
    tools,
    tool_choice: "required",
    temperature: 0,
    max_tokens: 200,
  });
  return answer.choices[0];
}

async function streamedToolCall() {
  const events = [];
  const runner = client.chat.completions.stream({
    model: "default",
    messages: question,
    tools,
    tool_choice: { type: "function", function: { name: "add" } },
    temperature: 0,
    max_tokens: 200,
  });
  runner.on("tool_calls.function.arguments.delta", (event) => events.push(event.arguments_delta));
  const final = await runner.finalChatCompletion();
  return { choice: final.choices[0], deltas: events };
}

async function aborted() {
  const stream = await client.completions.create({
    model: "default",
    prompt: "Once upon a time",
    max_tokens: 2000,
    stream: true,
  }, {});
  let events = 0;
  for await (const _ of stream) {
    events += 1;
    if (events === 3) {
      stream.controller.abort();
      break;
    }
  }
  return events;
}

async function refused() {
  try {
    await client.chat.completions.create({ model: "default", messages: question, temperature: 1000 });
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param };
  }
  return null;
}

console.log(
  JSON.stringify({
    models: (await client.models.list()).data.map((model) => model.id),
    streamed: await streamed(),
    toolCall: await toolCall(),
    streamedToolCall: await streamedToolCall(),
    aborted: await aborted(),
    refused: await refused(),
  }),
);
