export LLM_USER_PATH="$HOME/llm"
mkdir -p "$LLM_USER_PATH"
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: nano
  model_name: nano
  api_base: "http://127.0.0.1:8000/v1"
  api_key_name: fastblt
  completion: true
END
llm keys set fastblt --value the-key-of-your-server
llm --model nano --option max_tokens 16 --option temperature 0 "def f("
