# The folder "tokenizer" holds a Hugging Face tokenizer with the server's ids.
HF_HUB_OFFLINE=1 guidellm run --disable-console \
  --backend kind=openai_http,target=http://127.0.0.1:8000,request_format=/v1/completions,api_key=the-key-of-your-server \
  --data kind=synthetic_text,prompt_tokens=32,output_tokens=24 \
  --tokenizer kind=huggingface_auto,model=tokenizer \
  --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=3 \
  --output kind=json,path=report.json
