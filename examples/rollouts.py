"""Policy gradients with rollouts in the same process: generate, reward, learn, update, repeat.

    python examples/rollouts.py --iterations 100

The trainer's model is ``lserve_jax.logits``, the rollouts are those of an ``LLM`` on the same
parameters: both say the same of a token but for rounding, so that a step is on policy. Advantages
are rewards against the mean of the same prompt's answers. The reward here is the share of vowels
among an answer's letters; write your own ``reward``.

Each step donates its parameters and the optimiser's state, so no second copy of either exists. The
engine shares the parameters: after a step it gets the new ones before it runs again.
"""

import dataclasses
import functools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int

import convert
from lserve_jax import LLM, ModelConfig, RequestOutput, SamplingParams, logits
from lserve_jax.model.params import Params

PROMPTS = (
    "Name an animal.",
    "Say something about the sea.",
    "What do you like about rain?",
    "Describe a house in one sentence.",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a model by policy gradients to write more vowels."""

    # What --model of lserve_jax.generate takes.
    model: str = "smollm2-135m-instruct"
    iterations: int = 100
    # Answers to each prompt, at least two: they are compared with each other.
    answers: int = 4
    # Tokens of an answer.
    max_tokens: int = 32
    learning_rate: float = 3e-6
    # Of parameters, activations and the engine.
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one iteration was like."""

    reward: float  # mean over answers
    gap: float  # largest difference between a rollout's and the trainer's log probability
    update_seconds: float  # of LLM.update_params
    seconds: float  # of all of it
    compilations: int  # by XLA
    peak_memory: int  # bytes of host memory, the most so far


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts and answers, padded on the right to one length."""

    tokens: Int[Array | np.ndarray, "N T"]
    # Of each next token; 0 where it is not of the answer.
    logprobs: Float[Array | np.ndarray, "N T-1"]  # as it was sampled
    weights: Float[Array | np.ndarray, "N T-1"]  # the answer's advantage
    mask: Float[Array | np.ndarray, "N T-1"]  # 1 for tokens of the answer


def reward(text: str) -> float:
    """Share of vowels among the letters of a text."""
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(len(letters), 1)


def make_batch(outputs: Sequence[RequestOutput], length: int) -> tuple[Batch, float]:
    """All answers with their advantages, padded to ``length``; and the mean reward."""
    rows = [(output, answer) for output in outputs for answer in output.outputs]
    rewards = np.array([[reward(answer.text) for answer in output.outputs] for output in outputs])
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
    tokens = np.zeros((len(rows), length), np.int32)
    logprobs, weights, mask = (np.zeros((len(rows), length - 1), np.float32) for _ in range(3))
    for i, (output, answer) in enumerate(rows):
        prompt = len(output.prompt_token_ids)
        end = prompt + len(answer.token_ids)
        tokens[i, :end] = [*output.prompt_token_ids, *answer.token_ids]
        of_answer = slice(prompt - 1, end - 1)  # positions that predict its tokens
        logprobs[i, of_answer], mask[i, of_answer] = answer.token_logprobs, 1
        weights[i, of_answer] = advantages[i]
    batch = Batch(tokens=tokens, logprobs=logprobs, weights=weights, mask=mask)
    return batch, float(rewards.mean())


def loss(config: ModelConfig, params: Params, batch: Batch) -> tuple[Array, Array]:
    """The policy-gradient loss, and how far the model is from what sampled the batch."""
    predicted = jax.nn.log_softmax(logits(config, params, batch.tokens)[:, :-1])
    logprobs = jnp.take_along_axis(predicted, batch.tokens[:, 1:, None], axis=2)[..., 0]
    difference = (logprobs - batch.logprobs) * batch.mask
    # The ratio is 1 but for rounding; its gradient is that of the log probability.
    value = -(jnp.exp(difference) * batch.weights).sum() / batch.mask.sum()
    return value, jnp.abs(difference).max()


def train(args: Arguments) -> list[Iteration]:
    """Runs the loop; prints and returns what each iteration was like."""
    config, params = convert.load(args.model, dtype=args.dtype)
    tokenizer = convert.load_tokenizer(convert.resolve(args.model).path)
    llm = LLM(
        (config, params),
        tokenizer=tokenizer,
        dtype=args.dtype,
        backend="reference" if args.dtype == "float32" else "auto",  # kernels are for bfloat16
        max_num_seqs=len(PROMPTS) * args.answers,
        kv_cache_bytes=1 << 28,
        seed=args.seed,
    )
    sampling = SamplingParams(n=args.answers, max_tokens=args.max_tokens)
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in PROMPTS]
    length = max(len(llm.token_ids(prompt)) for prompt in prompts) + args.max_tokens
    optimiser = optax.adam(args.learning_rate)
    state = jax.jit(optimiser.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, batch: Batch) -> tuple:
        (_, gap), gradients = jax.value_and_grad(loss, argnums=1, has_aux=True)(
            config, params, batch
        )
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gap

    compiled: list[str] = []

    def count(name: str, *_: object, **__: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    done: list[Iteration] = []
    for number in range(args.iterations):
        begin, before = time.perf_counter(), len(compiled)
        outputs = llm.generate(prompts, sampling)
        batch, mean_reward = make_batch(outputs, length)
        params, state, gap = jax.block_until_ready(step(params, state, batch))
        updating = time.perf_counter()
        llm.update_params(params)
        end = time.perf_counter()
        new = Iteration(
            reward=mean_reward,
            gap=float(gap),
            update_seconds=end - updating,
            seconds=end - begin,
            compilations=len(compiled) - before,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        done.append(new)
        print(number, dataclasses.asdict(new), flush=True)
    jax.monitoring.unregister_event_duration_listener(count)
    return done


if __name__ == "__main__":
    train(tyro.cli(Arguments))
