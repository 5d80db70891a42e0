from langchain_openai import OpenAI

llm = OpenAI(
    base_url="http://127.0.0.1:8000/v1",
    api_key="the-key-of-your-server",
    model="nano",
    max_tokens=16,
    temperature=0,
)
print(llm.invoke("def f("))
