from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    api_base="http://127.0.0.1:8000/v1",
    api_key="the-key-of-your-server",
    model="nano",
    is_chat_model=False,
    context_window=8192,
    max_tokens=16,
    temperature=0,
)
print(llm.complete("def f(").text)
