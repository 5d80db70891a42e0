# The folder "tokenizer" holds a Hugging Face tokenizer with the server's ids, and "tasks" a task of one's own.
export OPENAI_API_KEY=the-key-of-your-server
lm-eval run --model local-completions \
  --model_args base_url=http://127.0.0.1:8000/v1/completions,model=nano,tokenizer=tokenizer \
  --tasks choices --include_path tasks --output_path out --log_samples
