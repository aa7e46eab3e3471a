"""Offline generation: prompts in, text out (vLLM's ``LLM``).

llm = LLM("smollm2-135m-instruct")
outputs = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print(outputs[0].outputs[0].text)
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.attention_patterns import load_pattern
from convert.tokenizers import load_tokenizer
from lserve_jax.attention.cache import CacheSpec, KVDtype, cache_bytes, make_spec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.engine import SMALLEST_CHUNK, Engine
from lserve_jax.engine.prefix import CommonPrefix, Prefix
from lserve_jax.engine.relay import RelayMode, check_mode
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.heads import partition_heads, permute_heads
from lserve_jax.model.llama import Params
from lserve_jax.outputs import Completion, RequestOutput
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.tokenizer import Tokenizer
from pallas_kernels.api import Backend, resolve_backend

# Text, or {"prompt_token_ids": [...]}, where "prompt" may be the text that they come from.
Prompt = str | Mapping[str, Any]
Message = Mapping[str, str]  # {"role": ..., "content": ...}
SharedPrefix = Literal["auto", "off"] | Prefix
# Called with (prompt index, completion index, new text) as text is made.
OnText = Callable[[int, int, str], None]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The CPU has no reported limit; more than this is taken only when asked for.
CPU_CACHE_BYTES = 2 << 30


def resolve_dtype(dtype: str | None):
    """The JAX dtype of a name; None takes bfloat16 on accelerators and float32 on the CPU."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; known: {sorted(DTYPES)}")
    return DTYPES[dtype]


def check_backend(backend: Backend) -> None:
    """Raises ``NotImplementedError`` for kernels on a device that they are not for."""
    if resolve_backend(backend) == "mosaic" and resolve_backend("auto") != "mosaic":
        device = jax.devices()[0].device_kind
        raise NotImplementedError(f"{backend=} needs a Hopper GPU, the default device is {device}")


class LLM:
    """A model, its tokenizer and an engine.

    model: alias, checkpoint directory, ``.gguf`` file, Orbax directory or Hugging Face id (see
        ``convert.resolve``); or a loaded ``(config, params)`` pair, which has no tokenizer.
    dtype: "float32" or "bfloat16"; None takes bfloat16 on accelerators and float32 on the CPU.
    max_model_len: longest prompt + generation in tokens; None takes the model's own limit.
    max_num_seqs: requests that run at the same time.
    attention: "dense", or "lserve" with the settings in ``sparsity`` (None: ``SparsityConfig()``).
    kv_dtype: "auto" stores keys and values in ``dtype``, "int8" with a scale per token and head.
    kv_cache_bytes: memory for the retrieval pages; None takes ``memory_fraction`` of what the
        device has free, on a CPU 2 GiB.
    memory_fraction: share of the free device memory for the KV cache; the rest is for activations.
    max_prefixes: shared prefixes that can be held at a time.
    relay: whether requests with a shared prefix read it together: "always", "never", or "auto",
        where it pays (see ``relay.py``).
    deterministic: a request's tokens do not depend on what else runs; needs relay="never" (in
        dense attention "always" too), and costs speed while few requests run. With int8 storage
        sharing a prefix changes them still.
    prefill_chunk_size: prompt tokens run at once, a power of two; bounds activation memory.
    burst_steps: decode steps between two looks at the queue; tokens are handed out at that grain.
    backend: "mosaic", the Pallas kernels for Hopper GPUs; "reference", plain JAX, runs anywhere;
        "auto" takes the kernels on such a GPU.
    adapter: directory of a PEFT LoRA adapter to merge at load.
    seed: from which requests without a seed of their own derive theirs.
    progress: show progress bars on stderr while loading.

    Raises ``ValueError`` for settings that contradict each other or the model, and
    ``NotImplementedError`` for kernels on a device that they are not for.
    """

    def __init__(
        self,
        model: str | tuple[ModelConfig, Params],
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        attention: Literal["dense", "lserve"] = "dense",
        sparsity: SparsityConfig | None = None,
        kv_dtype: KVDtype = "auto",
        kv_cache_bytes: int | None = None,
        memory_fraction: float = 0.8,
        max_prefixes: int = 8,
        relay: RelayMode = "auto",
        deterministic: bool = False,
        prefill_chunk_size: int = 8192,
        burst_steps: int = 16,
        backend: Backend = "auto",
        adapter: str | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        sparsity = _check_settings(
            attention, sparsity, max_num_seqs, prefill_chunk_size, kv_dtype, backend
        )
        check_mode(relay, deterministic, sparsity)
        if not 0 < memory_fraction <= 1:
            raise ValueError(f"{memory_fraction=} must lie in (0, 1]")
        if max_prefixes < 0:
            raise ValueError(f"{max_prefixes=} must not be negative")
        if burst_steps < 1:
            raise ValueError(f"{burst_steps=} must be at least 1")
        compute_dtype = resolve_dtype(dtype)
        self.tokenizer: Tokenizer | None = None
        if isinstance(model, str):
            source = convert.resolve(model, progress=progress)
            self.config, params = convert.load(
                source, dtype=compute_dtype, adapter=adapter, progress=progress
            )
            self.tokenizer = load_tokenizer(source.path)
        elif adapter is not None:
            raise ValueError(f"{adapter=} needs a checkpoint; merge it into the params given")
        else:
            self.config, params = model
            params = jax.tree.map(lambda x: jnp.asarray(x, compute_dtype), params)
        config = self.config
        self.max_model_len = _check_length(config, max_model_len)
        pattern = sparsity.pattern if sparsity is not None else None
        self.partition = partition_heads(
            None if pattern is None else load_pattern(pattern),
            0.0 if sparsity is None else sparsity.resolved_streaming_fraction,
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
        )
        params = permute_heads(config, params, self.partition)
        spec = make_spec(
            config,
            sparsity=sparsity,
            num_retrieval_heads=self.partition.num_retrieval,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            num_pages=1,
            max_prefixes=max_prefixes,
            kv_dtype=kv_dtype,
        )
        num_pages = _plan_pages(config, spec, compute_dtype, kv_cache_bytes, memory_fraction)
        spec = dataclasses.replace(spec, num_pages=num_pages)
        self.dtype, self.spec = compute_dtype, spec
        if config.tie_word_embeddings and jax.default_backend() == "cpu":
            config, params = _untie(config, params)
        eos = config.eos_token_ids
        if self.tokenizer is not None:
            eos = tuple(dict.fromkeys((*eos, *self.tokenizer.eos_token_ids)))
        self.engine = Engine(
            config,
            params,
            spec,
            dtype=compute_dtype,
            max_model_len=self.max_model_len,
            eos_token_ids=eos,
            prefill_chunk_size=prefill_chunk_size,
            burst_steps=burst_steps,
            relay=relay,
            deterministic=deterministic,
            backend=backend,
        )
        self._seed, self._counter = seed, itertools.count()

    def memory_plan(self) -> dict[str, int]:
        """Bytes of the parameters and of each part of the KV cache (see ``cache.py``)."""
        params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.engine.params))
        return {"parameters": params, **cache_bytes(self.config, self.spec, self.dtype)}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        shared_prefix: SharedPrefix = "auto",
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; results come in the order of the prompts.

        ``sampling_params``: one for all, or one a prompt; None is ``SamplingParams()``.
        ``shared_prefix``: "auto" computes the longest common prefix of all prompts (whole pages of
        tokens) once; "off" does not; a ``Prefix`` is one that all prompts must begin with. Prompts
        that begin with a prefix that is held already share it in any case.

        Raises ``ValueError`` before anything runs if a prompt is empty, has a token outside the
        vocabulary, is too long with its ``max_tokens``, does not begin with the prefix given, or is
        text and there is no tokenizer.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many sampling params, got {len(sampling_params)}"
            )
        ids = [
            self.check_request(prompt, sampling)
            for prompt, sampling in zip(prompts, sampling_params, strict=True)
        ]
        beginning = []
        if isinstance(shared_prefix, Prefix):
            _check_begins(shared_prefix, ids)
        elif shared_prefix not in ("auto", "off"):
            raise ValueError(f"{shared_prefix=} must be 'auto', 'off' or a Prefix")
        elif shared_prefix == "auto":
            beginning = self._common_beginning(ids, sampling_params)
        tokenised = [
            {"prompt": _text(prompt), "prompt_token_ids": tokens}
            for prompt, tokens in zip(prompts, ids, strict=True)
        ]
        requests = zip(tokenised, sampling_params, strict=True)
        outputs = dict(self.stream(requests, beginning=beginning, on_text=on_text))
        return [outputs[position] for position in range(len(prompts))]

    def stream(
        self,
        requests: Iterable[tuple[Prompt, SamplingParams]],
        *,
        beginning: Sequence[int] = (),
        on_text: OnText | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Runs requests as they are drawn; yields (position, output) of each when it has finished.

        No more are drawn than can run and wait to run next, so there may be any number of them.
        ``beginning``: token ids of whole pages that the prompts begin with, to be computed once.

        Raises ``ValueError`` for a request that ``check_request`` refuses. After an error, or when
        it is closed before its end, its requests are gone; prefixes that are held stay, unless the
        device failed.
        """
        if self.engine.has_unfinished_requests:
            raise ValueError("the engine is still busy with another call's requests")
        running: dict[str, tuple[_Running, Completion]] = {}  # by the engine's request id
        drawn = enumerate(requests)
        prefix = None
        try:
            if beginning and self.engine.can_hold_prefix:
                prefix = self.engine.add_prefix(beginning)
            while True:
                # So many may wait that the next step can fill every slot.
                room = max(self.spec.max_num_seqs - len(self.engine.scheduler.waiting), 0)
                for position, (prompt, sampling) in itertools.islice(drawn, room):
                    running |= self._add(position, prompt, sampling)
                if not self.engine.has_unfinished_requests:
                    break
                for new in self.engine.step():
                    request, completion = running[new.request_id]
                    text = completion.append(new)
                    if text and on_text is not None:
                        on_text(request.position, completion.index, text)
                    if not completion.finished:
                        continue
                    del running[new.request_id]
                    if new.finish_reason is None:
                        self.engine.cancel(new.request_id)  # a stop string: only we can see it
                    if all(completion.finished for completion in request.completions):
                        yield request.position, request.output()
            if prefix is not None:
                prefix.release()
        except BaseException:  # an error in on_text or on the device, Ctrl-C, or closed early
            self.engine.abandon(running)
            if prefix is not None and not prefix.is_released:
                prefix.release()
            raise

    def prefix(self, prompt: Prompt) -> Prefix:
        """Computes keys and values of a prompt's beginning once, for all requests that share it.

        Requests whose token ids begin with the prefix's whole pages use it from then on, until it
        is released. Of a text the last token is left out: it could be another one where the text
        goes on.

        Raises ``ValueError`` where ``Engine.add_prefix`` does.
        """
        ids = self.token_ids(prompt)
        return self.engine.add_prefix(ids[:-1] if isinstance(prompt, str) else ids)

    def load_prefix(self, path: str | Path) -> Prefix:
        """A prefix that ``Prefix.save`` wrote; see ``Engine.load_prefix``."""
        return self.engine.load_prefix(path)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        shared_prefix: SharedPrefix = "auto",
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template."""
        single = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        prompts = [self.chat_prompt(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, shared_prefix=shared_prefix, on_text=on_text)

    def chat_prompt(self, conversation: Sequence[Message]) -> Prompt:
        """One conversation as a prompt, through the model's chat template.

        Raises ``ValueError`` if there is no template or it refuses the conversation.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer with a chat template; the model has none")
        text = self.tokenizer.apply_chat_template(conversation)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def check_request(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        """The prompt's token ids; raises ``ValueError`` if the request could never run."""
        ids = self.token_ids(prompt)
        self.engine.check_request(ids, sampling)
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"stop={sampling.stop} needs a tokenizer; use stop_token_ids")
        return ids

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The prompt as the model sees it. Raises ``ValueError`` for text without a tokenizer."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "the model has no tokenizer: give prompts as {'prompt_token_ids': [...]}"
                )
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt:
            raise ValueError(f"a prompt must be text or hold 'prompt_token_ids', got {prompt!r}")
        ids = list(prompt["prompt_token_ids"])
        for token in ids:
            if not isinstance(token, Integral):
                raise ValueError(f"prompt token id {token!r} must be an integer")
        return [int(token) for token in ids]

    def _add(
        self, position: int, prompt: Prompt, sampling: SamplingParams
    ) -> "dict[str, tuple[_Running, Completion]]":
        """Hands a request's completions to the engine; returns them by their ids there."""
        ids = self.check_request(prompt, sampling)
        number = next(self._counter)
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        request = _Running(
            position=position,
            request_id=str(number),
            prompt=_text(prompt),
            token_ids=ids,
            completions=[Completion(i, sampling, self.tokenizer) for i in range(sampling.n)],
        )
        added = {}
        for completion in request.completions:
            request_id = f"{number}-{completion.index}"
            self.engine.add_request(
                request_id, ids, sampling, seed=seed, completion=completion.index
            )
            added[request_id] = (request, completion)
        return added

    def _common_beginning(
        self, prompts: Sequence[list[int]], sampling_params: Sequence[SamplingParams]
    ) -> list[int]:
        """Whole pages of tokens that all prompts begin with; none where that saves nothing."""
        if sum(sampling.n for sampling in sampling_params) < 2:
            return []
        common = CommonPrefix()
        for ids in prompts:
            if self.engine.scheduler.match(np.array(ids))[1]:
                return []  # prefixes that are held already serve these prompts
            common.add(ids)
        return common.whole_pages(self.spec.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Running:
    """A request whose completions are in the engine."""

    position: int  # among the requests of its call
    request_id: str
    prompt: str | None
    token_ids: list[int]
    completions: list[Completion]

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.token_ids),
            outputs=[completion.output() for completion in self.completions],
            finished=True,
        )


def _text(prompt: Prompt) -> str | None:
    return prompt if isinstance(prompt, str) else prompt.get("prompt")


def _check_begins(prefix: Prefix, prompts: Sequence[Sequence[int]]) -> None:
    if prefix.is_released:
        raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released")
    for i, ids in enumerate(prompts):
        # Only whole pages are shared: what follows them may be cut into other tokens in a prompt.
        shared = prefix.token_ids[: prefix.num_shared_tokens]
        beginning = np.array(ids[: len(shared)])
        same = beginning == shared[: len(beginning)]
        if len(beginning) < len(shared) or not same.all():
            at = len(beginning) if same.all() else int(same.argmin())
            raise ValueError(
                f"prompt {i} does not begin with the prefix of {len(prefix.token_ids)} tokens: "
                f"they differ at token {at}"
            )


def _untie(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """A copy of the embedding as output projection ``[E, V]``.

    XLA's CPU matrix-vector product is five times slower on a transposed matrix, and the output
    projection is a fifth of a small model's weights.
    """
    kernel = jnp.array(params["embed_tokens"]["embedding"].T)
    config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, {**params, "lm_head": {"kernel": kernel}}


def _check_settings(
    attention: str,
    sparsity: SparsityConfig | None,
    max_num_seqs: int,
    prefill_chunk_size: int,
    kv_dtype: str,
    backend: Backend,
) -> SparsityConfig | None:
    """The sparsity to run with, None for dense."""
    check_backend(backend)
    if attention not in ("dense", "lserve"):
        raise ValueError(f"attention={attention!r} must be 'dense' or 'lserve'")
    if attention == "dense" and sparsity is not None:
        raise ValueError(f"sparsity={sparsity} needs attention='lserve', got attention='dense'")
    if kv_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_dtype={kv_dtype!r} must be 'auto' or 'int8'")
    if max_num_seqs < 1:
        raise ValueError(f"{max_num_seqs=} must be at least 1")
    if prefill_chunk_size < SMALLEST_CHUNK or prefill_chunk_size & (prefill_chunk_size - 1):
        raise ValueError(
            f"{prefill_chunk_size=} must be a power of two of at least {SMALLEST_CHUNK}"
        )
    if attention == "dense":
        return None
    return SparsityConfig() if sparsity is None else sparsity


def _check_length(config: ModelConfig, max_model_len: int | None) -> int:
    limit = config.max_position_embeddings
    if max_model_len is None:
        return limit
    if not 1 <= max_model_len <= limit:
        raise ValueError(f"{max_model_len=} must lie in [1, {limit}], the model's own limit")
    return max_model_len


def _plan_pages(
    config: ModelConfig,
    spec: CacheSpec,
    dtype,
    kv_cache_bytes: int | None,
    memory_fraction: float,
) -> int:
    """How many retrieval pages to allocate, given a spec with one page.

    Never more than can be used at once. Raises ``ValueError`` if not even one page fits.
    """
    sizes = cache_bytes(config, spec, dtype)
    page_bytes = sizes["retrieval"] + sizes["key_stats"]
    if kv_cache_bytes is None:
        stats = jax.local_devices()[0].memory_stats()  # None on the CPU
        kv_cache_bytes = CPU_CACHE_BYTES
        if stats is not None:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            kv_cache_bytes = max(int(memory_fraction * (free - sum(sizes.values()))), 0)
    pages = kv_cache_bytes // max(page_bytes, 1)
    if pages < 1:
        raise ValueError(f"{kv_cache_bytes=} holds no page: one takes {page_bytes} bytes")
    # Sequences of all slots, and prefixes that none of them shares.
    return min((spec.max_num_seqs + spec.max_prefixes) * spec.pages_per_sequence, pages)
