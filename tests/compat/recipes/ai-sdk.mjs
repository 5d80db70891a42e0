import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText } from "ai";

const server = createOpenAICompatible({
  name: "fastblt",
  baseURL: "http://127.0.0.1:8000/v1",
  apiKey: "the-key-of-your-server",
});
const answer = await generateText({
  model: server.completionModel("nano"),
  prompt: "def f(",
  maxOutputTokens: 16,
  temperature: 0,
});
console.log(answer.text);
