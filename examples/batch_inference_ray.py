"""Batch inference on many GPUs or machines: Ray Data deals prompts out to actors, one LLM each.

    pip install "lserve-jax[ray]"
    python examples/batch_inference_ray.py --prompts-file prompts.jsonl --output answers --actors 4
    python examples/batch_inference_ray.py … --actors 2 --gpus-per-actor 0    # on CPUs

The prompts file has a JSON object with "prompt" a line; what else an object holds is kept. Without
a cluster Ray starts on this machine. For one, run this where RAY_ADDRESS or ``ray start`` says
where it is, with paths and a model that every machine can read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import tyro

from lserve_jax import LLM, SamplingParams
from lserve_jax.batch import PromptFormat


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Answer the prompts of a file on several GPUs, or on CPUs."""

    # JSON Lines with "prompt".
    prompts_file: Path
    # Directory for the answers, JSON Lines too; made if it does not exist.
    output: Path
    # What --model of lserve_jax.generate takes.
    model: str = "smollm2-135m-instruct"
    # How many LLMs run.
    actors: int = 1
    # GPUs of each; 0 runs on CPUs.
    gpus_per_actor: int = 1
    # CPUs of each. Ray needs one beside them, to read and write: else it waits for ever.
    cpus_per_actor: float = 1.0
    # Prompts that an actor gets at a time. Several times --max-num-seqs keeps its slots busy.
    batch_size: int = 256
    # Prompts that run at the same time in an actor.
    max_num_seqs: int = 32
    # Stop after so many new tokens.
    max_tokens: int = 256


class Answerer:
    """An actor: loads its model once, then answers batch after batch."""

    def __init__(self, model: str, max_num_seqs: int, max_tokens: int):
        self.llm = LLM(model, max_num_seqs=max_num_seqs)
        self.sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.format = PromptFormat(chat=None, system=None)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        prompts = [self.format.apply(self.llm, str(prompt)) for prompt in batch["prompt"]]
        answers = [output.outputs[0] for output in self.llm.generate(prompts, self.sampling)]
        return {
            **batch,
            "text": [answer.text for answer in answers],
            "finish_reason": [answer.finish_reason for answer in answers],
            "generated_tokens": [answer.metrics.generated_tokens for answer in answers],
        }


def answer(prompts: ray.data.Dataset, args: Arguments) -> ray.data.Dataset:
    """The dataset with its answers, computed as it is read."""
    # One block a batch: actors are given whole blocks, and a small file is a single one.
    return prompts.repartition(target_num_rows_per_block=args.batch_size).map_batches(
        Answerer,
        fn_constructor_kwargs={
            "model": args.model,
            "max_num_seqs": args.max_num_seqs,
            "max_tokens": args.max_tokens,
        },
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_size=args.batch_size,
        num_gpus=args.gpus_per_actor,
        num_cpus=args.cpus_per_actor,
    )


def main() -> None:
    args = tyro.cli(Arguments)
    # Workers may have another working directory.
    prompts = ray.data.read_json(str(args.prompts_file.resolve()))
    answer(prompts, args).write_json(str(args.output.resolve()))


if __name__ == "__main__":
    main()
