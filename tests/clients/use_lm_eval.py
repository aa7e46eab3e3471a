"""lm-eval: its local-completions gives the numbers of ``lserve_jax.eval.lm_eval``, our adapter.

    python use_lm_eval.py URL MODEL

MODEL is what the server at URL runs; the adapter runs it in this process.
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from plain import BASE_URL, MODEL

from lserve_jax import LLM
from lserve_jax.eval.lm_eval import LServeLM

DOCUMENTS = [
    {"context": "The capital of France", "choices": [" is Paris", " is Rome", " eats"], "gold": 0},
    {"context": "2 plus 2 makes", "choices": [" 4", " 5", " a big fish"], "gold": 2},
    {"context": "Once upon a time", "choices": [" there", " under", "!"], "gold": 1},
    {"context": "The deepest of seas", "choices": [" is", " was", " sleeps"], "gold": 0},
]
TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "generate_until": {
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["zq"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{context}}{{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
# Relative: float32 roundings. The server has a prompt's log probabilities from its prefill, the
# adapter from decode steps.
CLOSE = 1e-4


def write_tasks(directory: Path) -> None:
    documents = directory / "documents.jsonl"
    documents.write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n")
    for kind, settings in TASKS.items():
        task = {
            "task": kind,
            "output_type": kind,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(documents)},
                "cache_dir": str(directory / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{context}}",
            **settings,
        }
        (directory / f"{kind}.yaml").write_text(json.dumps(task))  # YAML is a superset of JSON


def evaluate(model: Any, directory: Path, **options: Any) -> tuple[dict, dict]:
    """Metrics, and what the model answered to each document, by task."""
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return found["results"], answers


def same(a: Any, b: Any) -> bool:
    """Whether answers are equal, numbers within ``CLOSE``."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return math.isclose(float(a), float(b), rel_tol=CLOSE)
    except ValueError:
        return a == b


with tempfile.TemporaryDirectory() as folder:
    write_tasks(Path(folder))
    adapter = LServeLM(LLM(sys.argv[2], max_num_seqs=4, relay="never"))
    ours, our_answers = evaluate(adapter, Path(folder))
    arguments = {"model": MODEL, "base_url": f"{BASE_URL}/completions", "num_concurrent": 1}
    for batch_size in (1, 4):
        theirs, their_answers = evaluate(
            "local-completions",
            Path(folder),
            model_args={**arguments, "tokenizer_backend": "remote", "batch_size": batch_size},
        )
        for task in TASKS:
            assert same(our_answers[task], their_answers[task]), (
                f"{task}: {our_answers[task]} and {their_answers[task]}"
            )
            for name, value in ours[task].items():
                if isinstance(value, float):
                    assert same(value, theirs[task][name]), (
                        f"{task} {name}: {value} and {theirs[task][name]}"
                    )
