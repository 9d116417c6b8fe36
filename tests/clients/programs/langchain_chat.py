"""LangChain's ChatOpenAI: whole, streamed, in a batch."""

import os

from langchain_openai import ChatOpenAI

chat = ChatOpenAI(
    base_url=os.environ["BASE_URL"],
    model="SmolLM2-135M-Instruct",
    temperature=0,
    max_tokens=12,
    max_retries=0,
    extra_body={"kv": {"budget": 0.5}},
)
QUESTION = "What is the capital of France? Answer with one word."

whole = chat.invoke([("system", "You are brief."), ("human", QUESTION)])
assert "Paris" in whole.content, whole
assert whole.usage_metadata["output_tokens"] > 0
pieces = [piece.content for piece in chat.stream([("system", "You are brief."), ("human", QUESTION)])]
assert "".join(pieces) == whole.content
assert len(pieces) > 1
first, second = chat.batch([QUESTION, QUESTION])
assert first.content == second.content
