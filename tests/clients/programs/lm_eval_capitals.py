"""lm_eval's `local-completions` on a generating task, once for each KV setting.

python lm_eval_capitals.py MODEL TASKS '{"fp16": {"policy": "fp16", "budget": 1.0}}'

Scores, and the share of the FP16 bytes that the first prompt's KV takes, come into scores.json of the folder TASKS.
One process for all settings, and only the tasks of the folder: the `lm_eval` command reads its own 14,000 task files
first, which takes longer than the questions.
"""

import json
import os
import sys
from pathlib import Path

import lm_eval
import openai
from lm_eval.tasks import TaskManager

model, folder, settings = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)
os.chdir(folder)
client = openai.OpenAI(base_url=os.environ["BASE_URL"], max_retries=0)
document = json.loads(Path("capitals.jsonl").read_text().splitlines()[0])["document"]
found = {}
for name, kv in json.loads(settings).items():
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"{os.environ['BASE_URL']}/completions",
            "num_concurrent": 4,
            "max_retries": 1,
            "tokenizer_backend": None,
            "tokenized_requests": False,
        },
        tasks=["capitals"],
        task_manager=tasks,
        gen_kwargs={"kv": kv},
        log_samples=False,
    )
    sent = client.completions.create(model=model, prompt=document, max_tokens=2, extra_body={"kv": kv}).usage.kv
    score = results["results"]["capitals"]["exact_match,first_word"]
    found[name] = {"exact_match": score, "policy": sent["policy"], "budget_counted": sent["budget_counted"]}
Path("scores.json").write_text(json.dumps(found))
