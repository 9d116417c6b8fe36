"""litellm, which talks to a server as to OpenAI's and to vLLM's."""

import os

import litellm

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]

for provider in ("openai", "hosted_vllm"):
    options = {
        "model": f"{provider}/SmolLM2-135M-Instruct",
        "api_base": os.environ["BASE_URL"],
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 12,
        "num_retries": 0,
    }
    whole = litellm.completion(messages=MESSAGES, **options)
    assert "Paris" in whole.choices[0].message.content, whole
    pieces = litellm.completion(messages=MESSAGES, stream=True, **options)
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == whole.choices[0].message.content
    try:
        litellm.completion(messages=MESSAGES, **(options | {"model": f"{provider}/gpt-0"}))
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("another model is let through")
