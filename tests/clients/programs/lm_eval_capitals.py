"""lm_eval's `local-completions` on a generating task, once for each KV setting.

python lm_eval_capitals.py MODEL TASKS '{"fp16": {"policy": "fp16", "budget": 1.0}}'

The scores by setting come into scores.json of the folder TASKS. One process for all settings, and only the tasks of
that folder: the `lm_eval` command reads its own 14,000 task files first, which takes longer than the questions.
"""

import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

model, folder, settings = sys.argv[1:]
tasks = TaskManager(include_path=folder, include_defaults=False)
os.chdir(folder)
scores = {}
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
    scores[name] = results["results"]["capitals"]["exact_match,first_word"]
Path("scores.json").write_text(json.dumps(scores))
