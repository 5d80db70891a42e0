// OpenAI's Node client: whole answers, streams, errors, timeouts, retries.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const asked = JSON.parse(readFileSync(0, "utf8"));
const tell = (name, result) => console.log(JSON.stringify([name, result]));
const options = { baseURL: "http://127.0.0.1:8000/v1", apiKey: "the-key-of-your-server" };
const client = new OpenAI(options);

async function failure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    const { status, code, param } = error;
    return status ? [error.constructor.name, status, code, param] : [error.constructor.name];
  }
}

const parts = {
  async answers() {
    tell("whole", await client.completions.create(asked));
    const several = { ...asked, n: 2, logprobs: 2, echo: true, stop: ["\n\n", "return"] };
    tell("several", (await client.completions.create(several)).choices);
    let text = "";
    let usage = null;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.completions.create({ ...asked, ...options })) {
      text += chunk.choices.map((choice) => choice.text).join("");
      usage = chunk.usage ?? usage;
    }
    tell("stream", [text, usage]);
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) {
      tell("stream left early", chunk.choices.length);
      break;
    }
    const drafted = await client.completions.create({ ...asked, decoder: "blt-s" });
    tell("extension", [drafted.choices[0].text, drafted.usage.fastblt.decoder]);
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    tell("models", models);
  },
  async errors() {
    const wrong = new OpenAI({ ...options, apiKey: "wrong" });
    tell("bad key", await failure(() => wrong.completions.create(asked)));
    tell("bad value", await failure(() => client.completions.create({ ...asked, max_tokens: -1 })));
    tell("unknown field", await failure(() => client.completions.create({ ...asked, nope: 1 })));
    tell("unknown model", await failure(() => client.completions.create({ ...asked, model: "gpt" })));
    const long = { ...asked, max_tokens: 8000, n: 16 };
    tell("timeout", await failure(() => client.completions.create(long, { timeout: 200, maxRetries: 0 })));
    tell("abort", await failure(() => client.completions.create(long, { signal: AbortSignal.timeout(200) })));
  },
  async busy() {
    tell("refused", await failure(() => client.completions.create(asked, { maxRetries: 0 })));
    tell("retried", (await client.completions.create(asked, { maxRetries: 5 })).choices[0].text);
  },
};
await parts[process.argv[2]]();
