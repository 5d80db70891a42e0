from litellm import text_completion

answer = text_completion(
    model="text-completion-openai/nano",
    api_base="http://127.0.0.1:8000/v1",
    api_key="the-key-of-your-server",
    prompt="def f(",
    max_tokens=16,
    temperature=0,
)
print(answer.choices[0].text)
