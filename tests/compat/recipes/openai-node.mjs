import OpenAI from "openai";

const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "the-key-of-your-server" });
const completion = await client.completions.create({
  model: "nano",
  prompt: "def f(",
  max_tokens: 16,
  temperature: 0,
});
console.log(completion.choices[0].text);
