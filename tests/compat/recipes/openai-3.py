from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="the-key-of-your-server")
completion = client.completions.create(model="nano", prompt="def f(", max_tokens=16, temperature=0)
print(completion.choices[0].text)
