// Vercel's AI SDK: whole answers, streams, and errors.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const asked = JSON.parse(readFileSync(0, "utf8"));
const tell = (name, result) => console.log(JSON.stringify([name, result]));
const options = { name: "fastblt", baseURL: "http://127.0.0.1:8000/v1", apiKey: "the-key-of-your-server" };
const server = createOpenAICompatible({ ...options, includeUsage: true });
const call = (provider = server, model = "nano") => ({
  model: provider.completionModel(model),
  prompt: asked.prompt,
  maxOutputTokens: asked.max_tokens,
  temperature: asked.temperature,
  seed: asked.seed,
  maxRetries: 0,
});

async function failure(options) {
  try {
    await generateText(options);
  } catch (error) {
    return APICallError.isInstance(error) ? [error.statusCode, JSON.parse(error.responseBody).error.code] : error.name;
  }
}

const parts = {
  async answers() {
    const whole = await generateText(call());
    tell("whole", [whole.text, whole.finishReason, whole.usage.outputTokens]);
    tell("body", whole.request.body);
    let text = "";
    const stream = streamText(call());
    for await (const part of stream.textStream) text += part;
    tell("stream", [text, await stream.finishReason, (await stream.usage).outputTokens]);
    const drafted = await generateText({ ...call(), providerOptions: { fastblt: { decoder: "blt-s" } } });
    tell("extension", [drafted.text, drafted.request.body.decoder]);
  },
  async errors() {
    tell("bad key", await failure(call(createOpenAICompatible({ ...options, apiKey: "wrong" }))));
    tell("bad value", await failure({ ...call(), maxOutputTokens: 100000 }));
    tell("unknown model", await failure(call(server, "gpt")));
    tell("timeout", await failure({ ...call(), maxOutputTokens: 8000, abortSignal: AbortSignal.timeout(200) }));
  },
  async busy() {
    tell("refused", await failure(call()));
    tell("retried", (await generateText({ ...call(), maxRetries: 5 })).text);
  },
};
await parts[process.argv[2]]();
