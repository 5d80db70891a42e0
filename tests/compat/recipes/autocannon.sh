autocannon --json --connections 2 --amount 6 --method POST \
  --headers 'content-type=application/json' --headers 'authorization=Bearer the-key-of-your-server' \
  --body '{"model": "nano", "prompt": "def f(", "max_tokens": 16, "temperature": 0}' \
  http://127.0.0.1:8000/v1/completions
