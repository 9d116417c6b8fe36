"""The openai package, with its synchronous client."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE_URL"], max_retries=0)
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
GREEDY = {"temperature": 0, "max_tokens": 12}

(model,) = client.models.list().data
assert client.models.retrieve(model.id).id == model.id

whole = client.chat.completions.create(model=model.id, messages=MESSAGES, **GREEDY)
assert "Paris" in whole.choices[0].message.content, whole
assert whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole.usage.kv["kv_bytes_sent"] < whole.usage.kv["kv_fp16_bytes"]

stream = client.chat.completions.create(
    model=model.id, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
)
chunks = list(stream)
assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole.choices[0].message.content
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

exact = client.chat.completions.create(
    model=model.id, messages=MESSAGES, extra_body={"kv": {"policy": "fp16", "budget": 1.0}}, **GREEDY
)
assert exact.usage.kv["policy"] == "fp16"
assert exact.usage.kv["kv_bytes_sent"] > 0.9 * exact.usage.kv["kv_fp16_bytes"]

text = client.completions.create(model=model.id, prompt="The capital of France is", logprobs=2, **GREEDY)
assert "Paris" in text.choices[0].text
assert "".join(text.choices[0].logprobs.tokens) == text.choices[0].text
assert len(text.choices[0].logprobs.top_logprobs[0]) == 2
scored = client.chat.completions.create(model=model.id, messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 3

# KV of one precision: under a byte budget, the field n itself takes a byte or two from it.
EXACT = {"extra_body": {"kv": {"policy": "fp16", "budget": 1.0}}, "max_tokens": 8, "temperature": 1, "seed": 7}
seeded = [client.completions.create(model=model.id, prompt="Once", **EXACT).choices[0].text for _ in range(2)]
assert seeded[0] == seeded[1]
several = client.completions.create(model=model.id, prompt=["One, two,", [5, 6, 7]], max_tokens=3)
assert [one.index for one in several.choices] == [0, 1]
answers = client.completions.create(model=model.id, prompt="Once", n=2, **EXACT)
assert answers.choices[0].text == seeded[0]
assert len(answers.choices) == 2

# A call that is required is one by structure: even this small model cannot write another.
CITIES = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Tells the weather of a city.", "parameters": CITIES}
TOOLS = {
    "tools": [{"type": "function", "function": WEATHER}],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
}
question = [{"role": "user", "content": "How is the weather in Rome?"}]
asked = {"model": model.id, "messages": question, "temperature": 0, "max_tokens": 60, **TOOLS}
(chosen,) = client.chat.completions.create(**asked).choices
call = chosen.message.tool_calls[0]
assert (call.type, call.function.name) == ("function", "weather"), chosen
assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome"), call
assert chosen.finish_reason in ("tool_calls", "length"), chosen
pieces = [
    piece
    for chunk in client.chat.completions.create(stream=True, **asked)
    for piece in chunk.choices[0].delta.tool_calls or ()
    if piece.index == 0
]
assert (pieces[0].type, pieces[0].function.name) == ("function", "weather"), pieces
assert pieces[0].id
assert "".join(one.function.arguments for one in pieces) == call.function.arguments, pieces
question += [chosen.message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
told = client.chat.completions.create(model=model.id, messages=question, tools=TOOLS["tools"], **GREEDY)
assert told.choices[0].message.content or told.choices[0].message.tool_calls, told


def refused(kind, **fields):
    try:
        client.chat.completions.create(**{"model": model.id, "messages": MESSAGES, **GREEDY, **fields})
    except kind as error:
        return error
    raise AssertionError(f"{fields} is let through")


error = refused(openai.BadRequestError, extra_body={"best_of": 3})
assert error.param == "best_of", error
assert "best_of is 3" in error.message
assert refused(openai.BadRequestError, extra_body={"flavour": 1}).param == "flavour"
assert refused(openai.NotFoundError, model="gpt-0").code == "model_not_found"
assert "the model's context" in refused(openai.BadRequestError, max_tokens=1_000_000).message
refused(openai.APITimeoutError, timeout=0.01, max_tokens=200)
