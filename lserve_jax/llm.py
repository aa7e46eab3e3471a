"""Offline generation: prompts in, text out (vLLM's ``LLM``).

llm = LLM("smollm2-135m-instruct")
outputs = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print(outputs[0].outputs[0].text)
"""

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float

import convert
from lserve_jax.attention.cache import CacheSpec
from lserve_jax.checks import check_choice, check_integer, check_path, is_listing
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.judging import embed, judge
from lserve_jax.engine.options import EngineOptions, resolve_dtype, with_shipped_shares
from lserve_jax.engine.prefix import Prefix, check_begins
from lserve_jax.engine.request import PromptIds, check_deadline
from lserve_jax.engine.scoring import Score
from lserve_jax.memory import memory_errors
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from lserve_jax.outputs import RequestOutput
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.text_engine import CheckedPrompt, Prompt, TextEngine, check_tokenizer
from lserve_jax.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, and what else a template reads
# Called with (prompt index, completion index, new text) as text is made.
OnText = Callable[[int, int, str], None]
OPTIONS = tuple(field.name for field in dataclasses.fields(EngineOptions))


class LLM:
    """A model, its tokenizer and an engine.

    model: alias, checkpoint directory, ``.gguf`` file, Orbax directory or Hugging Face id (see
        ``convert.resolve``); or a loaded ``(config, params)`` pair, which has no tokenizer.
    tokenizer: that of a loaded pair; a checkpoint brings its own.
    adapter: directory of a PEFT LoRA adapter to merge at load.
    seed: from which requests without a seed of their own derive theirs.
    progress: show progress bars on stderr while loading and compiling.
    options: those of the engine, by name, such as ``max_model_len=4096, attention="lserve"``:
        ``engine.options.EngineOptions`` lists and explains them. Where ``sparsity`` names neither
        pattern nor head shares nor a token budget, lserve attention takes the head shares that are
        shipped for the model's name, if there are.

    Its methods may be called from several threads: they take turns.

    Raises ``ValueError`` for settings that contradict each other or the model, ``TypeError`` for an
    option that does not exist or cannot have such a value, and ``NotImplementedError`` for kernels
    on a device that they are not for. Where memory runs out, here or in a method, that is a
    ``MemoryError`` that says how much was wanted and which options to lower.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[ModelConfig, Params],
        *,
        tokenizer: Tokenizer | None = None,
        adapter: str | os.PathLike[str] | None = None,
        seed: int = 0,
        progress: bool = False,
        **options: Any,
    ):
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise TypeError(f"LLM has no option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
        self.options = EngineOptions(**options)
        check_integer("seed", seed, 0, most=math.inf)
        check_tokenizer(tokenizer)
        if not isinstance(adapter, str | os.PathLike | None):
            raise TypeError(f"{adapter=} must be the directory of an adapter")
        if adapter is not None:
            check_path("adapter", adapter)
        expected = None
        if isinstance(model, tuple):
            if adapter is not None:
                raise ValueError(f"{adapter=} needs a checkpoint; merge it into the params given")
            if len(model) != 2 or not isinstance(model[0], ModelConfig):
                raise TypeError("a loaded model must be the pair (config, params) of convert.load")
            config, params = model
        elif not isinstance(model, str | os.PathLike):
            raise TypeError(f"{model=} must be an alias, a path or a pair (config, params)")
        else:
            if tokenizer is not None:
                raise ValueError("tokenizer= is for a (config, params) pair: a checkpoint has one")
            source = convert.resolve(model, progress=progress)
            if adapter is None:
                self.options = with_shipped_shares(self.options, source)
            config = convert.read_config(source, adapter=adapter)
            tokenizer = convert.load_tokenizer(source.path)
            form = {
                "dtype": resolve_dtype(self.options.dtype),
                "weights": self.options.weights,
                "weight_group": self.options.weight_group,
            }
            if self.options.warmup != "none":  # else nothing is compiled before they are there
                expected = convert.expected_params(source, config, **form)

            def params() -> Params:
                return convert.load(source, adapter=adapter, progress=progress, **form)[1]

        with memory_errors():
            self.engine = build_engine(
                config,
                params,
                self.options,
                expected=expected,
                eos_token_ids=() if tokenizer is None else tokenizer.eos_token_ids,
                progress=progress,
            )
        self.text_engine = TextEngine(self.engine, tokenizer, seed=seed)
        # One call at a time steps the engine. A thread may take it again: what it calls inside a
        # call of its own is refused, not waited for.
        self._lock = threading.RLock()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that takes and returns token ids only."""
        return self.text_engine.tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's architecture as it runs."""
        return self.engine.config

    @property
    def spec(self) -> CacheSpec:
        """Sizes of the cache."""
        return self.engine.spec

    @property
    def dtype(self) -> Any:
        """Of weights and arithmetic."""
        return self.engine.runner.dtype

    @property
    def max_model_len(self) -> int:
        """Longest prompt + generation, in tokens."""
        return self.engine.max_model_len

    def memory_plan(self) -> dict[str, int]:
        """Bytes of the parameters and of each part of the KV cache (see ``attention/cache.py``)."""
        return self.engine.memory_plan()

    def update_params(self, params: Params) -> None:
        """Runs other weights of the model from now on, as a training step makes them.

        params: the same tree as those at the beginning: those given, or what ``convert.load``
            returns. A leaf's dtype may also be ``dtype``; a leaf that lies on other devices than
            the first one did is copied to where that one lay, any other stays where it is.

        Nothing is compiled, and nothing copied but what was copied at the beginning: heads that
        change places, casts, matrices that are quantised or packed, on a CPU a tied model's output
        projection. (One exception: where kernels run codes of 4 bits whose zero points were
        multiples of an eighth up to 16, others make programs anew.) Every other array is shared
        with the caller. A training step that takes ``params`` as donated takes them from here too:
        update again before the next request, which is refused until then.

        Prefixes are released and remembered prompts forgotten: they hold keys of the old weights. A
        call of another thread is waited for.

        Raises ``ValueError`` while requests run, for instance of an open ``stream``, and for
        ``params`` of another tree, shape or dtype: all differences are named, nothing has changed.
        """
        with self._lock, memory_errors():
            self.engine.update_params(params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        shared_prefix: Prefix | None = None,
        on_text: OnText | None = None,
        deadline: float | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; results come in the order of the prompts.

        ``sampling_params``: one for all, or one a prompt; None is ``SamplingParams()``.
        What prompts begin with that was computed before, in this call or an earlier one, is not
        computed again (docs/prefix-cache.md), unless their ``prompt_logprobs`` are asked for: these
        run every token of the prompt. Where there are more than can run at once, those that begin
        alike run after each other, whatever the order they are given in. ``shared_prefix`` is one
        that all prompts must begin with. ``deadline`` seconds from now every completion ends with
        what it has (``finish_reason`` "deadline").

        Several threads may call it: they take turns.

        Raises ``ValueError`` before anything runs if a prompt is empty, has a token outside the
        vocabulary, is too long with its ``max_tokens``, does not begin with the prefix given, or is
        text and there is no tokenizer, for sampling that cannot be followed, and while requests of
        a ``stream`` run; ``TypeError`` for what is no list of prompts or no ``SamplingParams``;
        ``FloatingPointError`` for logits that are not finite; afterwards ``ValueError`` for a
        grammar that became too complex in the course of a text.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a prompt or a list of them, got {prompts!r}")
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence):
            raise TypeError(
                f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many sampling params, got {len(sampling_params)}"
            )
        with self._lock:
            checked = [
                self.text_engine.check(prompt, sampling)
                for prompt, sampling in zip(prompts, sampling_params, strict=True)
            ]
            if isinstance(shared_prefix, Prefix):
                check_begins(shared_prefix, [prompt.ids.ids for prompt in checked])
            elif shared_prefix is not None:
                raise TypeError(f"{shared_prefix=} must be a Prefix or None")
            numbers = self.text_engine.numbers(len(checked))
            requests = [
                (position, (checked[position], sampling_params[position]), numbers[position])
                for position in self._in_turn(checked)
            ]
            outputs = {}
            stream = self._stream(requests, on_text, self._until(deadline))
            with contextlib.closing(stream):
                for position, output in stream:
                    for error in (c.error for c in output.outputs if c.error is not None):
                        raise type(error)(f"prompt {position}: {error}")
                    outputs[position] = output
        return [outputs[position] for position in range(len(prompts))]

    def _in_turn(self, prompts: Sequence[CheckedPrompt]) -> list[int]:
        """In which order prompts begin to run.

        Where not all run at once those that share a page or more follow the first of them: what
        they share may not be there any more when all others have run.
        """
        order = list(range(len(prompts)))
        if not self.engine.enable_prefix_caching or len(prompts) <= self.engine.spec.max_num_seqs:
            return order
        P = self.engine.spec.page_size
        first: dict[tuple[str | None, bytes], int] = {}  # position of the first with such a page
        for i, prompt in enumerate(prompts):
            first.setdefault((prompt.cache_salt, prompt.ids.ids[:P].tobytes()), i)

        def place(i: int) -> tuple[int, bytes]:
            ids = prompts[i].ids.ids
            if len(ids) < P:
                return i, b""
            return first[prompts[i].cache_salt, ids[:P].tobytes()], ids.tobytes()

        return sorted(order, key=place)

    def stream(
        self,
        requests: Iterable[tuple[Prompt | CheckedPrompt, SamplingParams]],
        *,
        on_text: OnText | None = None,
        deadline: float | None = None,
    ) -> Generator[tuple[int, RequestOutput]]:
        """Runs requests as they are drawn; yields (position, output) of each when it has finished.

        One whose logits are not finite ends with ``finish_reason`` "error"; the others go on.

        No more are drawn than can run and wait to run next, so there may be any number of them.
        ``deadline``: seconds after which each request, from when it is drawn, ends with what it has
        (``finish_reason`` "deadline").

        Raises ``ValueError`` for a request that ``check_request`` refuses (``TypeError`` for what
        is no pair), and while another stream's requests run; a ``generate`` of another thread is
        waited for. After an error, or when it is closed before its end, its requests are gone;
        prefixes that are held stay, unless the device failed.
        """
        if not is_listing(requests):
            raise TypeError(f"{requests=} must give pairs of a prompt and its SamplingParams")
        check_deadline(deadline)
        drawn = ((position, request, None) for position, request in enumerate(requests))
        return self._stream(drawn, on_text, lambda: deadline)

    def _until(self, deadline: float | None) -> Callable[[], float | None]:
        """What is left of ``deadline`` seconds that begin now."""
        check_deadline(deadline)
        if deadline is None:
            return lambda: None
        end = self.engine.clock() + deadline
        return lambda: max(end - self.engine.clock(), 1e-9)  # a deadline must be positive

    def _stream(
        self,
        requests: Iterable[tuple[int, tuple[Prompt | CheckedPrompt, SamplingParams], int | None]],
        on_text: OnText | None,
        deadline: Callable[[], float | None],
    ) -> Generator[tuple[int, RequestOutput]]:
        if on_text is not None and not callable(on_text):
            raise TypeError(f"on_text={on_text!r} must be a function")
        text = self.text_engine
        position_of: dict[str, int] = {}  # by request id
        drawn = iter(requests)

        def advance() -> list[tuple[int, RequestOutput]] | None:
            """One step; what has finished in it, None at the end."""
            while self.engine.room > 0 and (new := next(drawn, None)) is not None:
                position, request, number = new
                if not isinstance(request, tuple | list) or len(request) != 2:
                    raise TypeError(
                        f"requests must give pairs of a prompt and its SamplingParams, got "
                        f"{request!r:.200} at {position}"
                    )
                prompt, sampling = request
                new_id = text.submit(prompt, sampling, number=number, deadline=deadline())
                position_of[new_id] = position
            if not text.has_unfinished_requests:
                if position_of:
                    raise ValueError(f"the engine was reset while {len(position_of)} requests ran")
                return None
            done = []
            for delta in text.step():
                position = position_of[delta.request_id]
                if delta.text and on_text is not None:
                    on_text(position, delta.index, delta.text)
                if delta.output is not None:
                    del position_of[delta.request_id]
                    done.append((position, delta.output))
            return done

        try:
            with self._lock, memory_errors():
                self._check_idle()
                done = advance()
            while done is not None:
                yield from done  # without the lock: the caller may never ask for the next
                with self._lock, memory_errors():
                    if not position_of:
                        self._check_idle()
                    done = advance()
        except BaseException:  # an error in on_text or on the device, Ctrl-C, or closed early
            with self._lock:
                if position_of:
                    text.abandon()
            raise

    def _check_idle(self) -> None:
        if self.engine.has_unfinished_requests:
            raise ValueError("the engine is still busy with another call's requests")

    def reset_prefix_cache(self) -> None:
        """Forgets all prompts that were computed, but those that somebody holds (``prefix``)."""
        with self._lock:
            self.engine.reset_prefix_cache()

    def prefix(self, prompt: Prompt) -> Prefix:
        """Computes keys and values of a prompt's beginning and keeps them until they are released.

        Requests whose token ids begin with the prefix's whole pages share it, as they share any
        prompt that was computed before; but this one is there for certain. Of a text the last token
        is left out: it could be another one where the text goes on. What is less than a page (64
        tokens) is shared by nobody.

        Raises ``ValueError`` where ``Engine.add_prefix`` does, for a text that is much longer than
        the model can read, and for a ``cache_salt``, which a prefix cannot have.
        """
        ids = self.text_engine.prefix_ids(prompt)
        with self._lock, memory_errors():
            return self.engine.add_prefix(ids.ids)

    def load_prefix(self, path: str | os.PathLike[str]) -> Prefix:
        """A prefix that ``Prefix.save`` wrote; see ``Engine.load_prefix``."""
        with self._lock, memory_errors():
            return self.engine.load_prefix(path)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[Sequence[int] | np.ndarray] | None = None,
        *,
        return_hidden: bool = False,
    ) -> list[Score]:
        """Log probabilities of given tokens, as arrays, under the attention that would write them.

        continuations: token ids that follow each prompt, such as a rollout's, to be judged; None
            judges every token of the prompts but the first.
        return_hidden: also what the logits after each token are made of.

        Dense attention judges by prefill, many texts at a time. With lserve attention, keys and
        values in 8 or 4 bits, or a ``prefill_dtype``, a prompt is prefilled and what follows it is
        fed to decode steps, which select their pages as in ``generate``: the log probabilities are
        those of the rollout. Those of a rollout whose prefix was read together with others'
        (``relay``) are not.

        Raises ``ValueError`` for an empty or too long text, token ids outside the vocabulary, and
        while requests run; ``FloatingPointError`` for logits that are not finite.
        """
        ids = self._listed_ids(prompts)
        vocab = self.config.vocab_size
        if continuations is None:
            following = [prompt[1:] for prompt in ids]
            ids = [prompt[:1] for prompt in ids]
        elif len(continuations) != len(ids):
            raise ValueError(f"{len(ids)} prompts need as many continuations, got {continuations}")
        else:
            following = [PromptIds.check(c, vocab, what="continuation").ids for c in continuations]
        with self._lock, memory_errors():
            return judge(self.engine, ids, following, keep_hidden=return_hidden)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Literal["mean", "last"] = "mean"
    ) -> Float[np.ndarray, "N E"]:
        """Hidden states of each prompt, float32: their mean over its tokens, or the last one.

        They come from after the model's last norm, out of prefill. Raises where ``score`` does.
        """
        check_choice("pooling", pooling, ("mean", "last"))
        ids = self._listed_ids(prompts)
        with self._lock, memory_errors():
            return embed(self.engine, ids, pooling)

    def _listed_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[np.ndarray]:
        """Token ids of a prompt or of several, at least one each."""
        listed = [prompts] if isinstance(prompts, str | Mapping) else prompts
        if not isinstance(listed, Sequence):
            raise TypeError(f"prompts must be a prompt or a list of them, got {prompts!r}")
        ids = [self.token_ids(prompt) for prompt in listed]
        for number, prompt in enumerate(ids):
            if len(prompt) == 0:
                raise ValueError(f"prompt {number} is empty: there is nothing to judge")
        return ids

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        shared_prefix: Prefix | None = None,
        on_text: OnText | None = None,
        deadline: float | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template.

        ``add_generation_prompt`` opens an answer of the model's. ``continue_final_message`` has the
        model go on with the last message instead, the beginning of an answer as a rule; it needs
        ``add_generation_prompt=False``. The output's text is then what follows that beginning.
        ``tools`` are JSON schemas of functions that the template tells the model of. What follows
        ``tools`` is as in ``generate``.

        Raises ``ValueError`` for no message, and where ``chat_prompt`` and ``generate`` do;
        ``TypeError`` for what is no list of messages.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise TypeError(
                f"messages={messages!r} must be a list of messages, or a list of such lists"
            )
        if len(messages) == 0:
            raise ValueError("messages=[] must hold at least one message")
        single = isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if single else messages)
        prompts = [
            self.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
            )
            for conversation in conversations
        ]
        return self.generate(
            prompts,
            sampling_params,
            shared_prefix=shared_prefix,
            on_text=on_text,
            deadline=deadline,
        )

    def chat_prompt(
        self,
        conversation: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """One conversation as a prompt, through the model's chat template; options as in ``chat``.

        Raises ``ValueError`` if there is no template or it refuses the conversation, where the
        options contradict each other, and for one that is much longer than the model can read.
        """
        if not isinstance(conversation, Sequence):
            raise TypeError(f"a conversation must be a list of messages, got {conversation!r}")
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer with a chat template; the model has none")
        text = self.tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
        self.text_engine.check_length(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def check_request(self, prompt: Prompt, sampling: SamplingParams) -> PromptIds:
        """The prompt's token ids; raises ``ValueError`` if the request could never run."""
        return self.text_engine.check(prompt, sampling).ids

    def token_ids(self, prompt: Prompt) -> np.ndarray:
        """The prompt as the model sees it, int32. See ``TextEngine.token_ids``."""
        return self.text_engine.token_ids(prompt).ids
