/** Calls the server with this tab's key; errors become sentences. */

const KEY = "fastblt-key";

/** Its message is shown to the user. `status` is undefined without a response. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Throws ServerError, or AbortError. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(sentence(body?.error?.message ?? `the server answered with status ${response.status}`), response.status);
}

function sentence(message) {
  return `${message[0].toUpperCase()}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}`;
}

/** Describes the served model: { name, version, parameters, max_length, block_size, decoders }. */
export async function describe() {
  const [models, version] = await Promise.all(
    ["v1/models", "version"].map(async (path) => (await call(path)).json()),
  );
  return { ...version, name: models.data[0].id };
}

/** Prometheus' text. */
export async function metrics() {
  return (await call("metrics")).text();
}

/** The chunks of a streamed completion, usage included. */
export async function* complete(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const headers = { "content-type": "application/json" };
  const response = await call("v1/completions", { method: "POST", headers, body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new ServerError("The connection broke off before the end.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        // Our events are one line each; other lines are comments or blank.
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new ServerError(sentence(chunk.error.message));
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke off before the end.");
  }
}
