"""What all routes work with: one model, its engine, and how much the service takes on."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lserve_jax.async_engine import AsyncEngine
from lserve_jax.outputs import RequestOutput, TextDelta
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.serve.errors import ApiError
from lserve_jax.serve.metrics import Metrics
from lserve_jax.serve.reads import ReadsStore
from lserve_jax.serve.tool_calls import ToolFormat, detect_tool_format
from lserve_jax.text_engine import CheckedPrompt, Prompt
from lserve_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What the service takes on.

    model_names: names that requests may give to the model; answers carry the first.
    api_keys: any of them opens ``/v1`` and the tokenizer's routes; empty: no key is needed.
    max_queue: completions that may wait beside those that run; beyond it the answer is 429.
    max_body_bytes: of a request's body.
    deadline: seconds after which an answer ends as it is, where the request says none; None: never.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 16 << 20
    deadline: float | None = None


@dataclass(kw_only=True)
class Service:
    """One model behind HTTP."""

    engine: AsyncEngine
    options: ServiceOptions
    reads: ReadsStore = field(default_factory=ReadsStore)  # of requests that asked for it
    created: int = field(default_factory=lambda: int(time.time()))  # the service, Unix time
    metrics: Metrics = field(init=False)
    _coming: int = 0  # completions on their way to the engine

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.text.engine, self.model_name)

    def now(self) -> int:
        """Unix time."""
        return int(time.time())

    @property
    def model_name(self) -> str:
        return self.options.model_names[0]

    @property
    def max_model_len(self) -> int:
        return self.engine.text.engine.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ``ApiError`` where the model has none."""
        if self.engine.text.tokenizer is None:
            raise ApiError("the model has no tokenizer: give token ids to /v1/completions")
        return self.engine.text.tokenizer

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the model's chat template writes tool calls; None if that is not known."""
        template = self.tokenizer.tool_template or self.tokenizer.chat_template
        return None if template is None else detect_tool_format(template)

    def check_model(self, name: str | None) -> None:
        """Raises ``ApiError`` for a model that is not served here."""
        if name is not None and name not in self.options.model_names:
            raise ApiError(
                f"the model {name!r:.200} is not served here; served: "
                f"{', '.join(self.options.model_names)}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def prompt(
        self, make: Callable[[], Prompt], cache_salt: str | None = None
    ) -> CheckedPrompt:
        """A prompt as token ids; ``make`` and the tokenizer run beside the event loop."""
        text = self.engine.text

        def checked() -> CheckedPrompt:
            prompt = make()
            if isinstance(prompt, str):
                text.check_length(prompt)
                return CheckedPrompt(text=prompt, ids=text.token_ids(prompt), cache_salt=cache_salt)
            ids = text.token_ids(prompt)
            return CheckedPrompt(text=prompt.get("prompt"), ids=ids, cache_salt=cache_salt)

        return await asyncio.to_thread(checked)

    async def compile(self, sampling: SamplingParams, *, param: str | None) -> None:
        """Makes the masks of what an answer must be, beside the event loop: the engine's thread
        finds them made.

        Raises ``ApiError`` with ``param``, the field that asks for it, where it cannot be followed.
        """
        if not sampling.needs_constraint:
            return
        try:
            await asyncio.to_thread(self.engine.text.constraints.make, sampling)
        except ValueError as error:
            said = str(error)
            if param == "tools":  # the grammar is none that the client wrote
                said = f"their schemas make no grammar: {said.partition(' cannot be used: ')[2]}"
            where = "" if param is None else f"{param}: "
            raise ApiError(f"{where}{said}", param=param) from None

    def max_tokens(self, prompt: CheckedPrompt, *, param: str) -> int:
        """How long an answer may be that asks for no length: what model and cache have room for.

        Raises ``ApiError`` for a prompt that leaves no room.
        """
        room = self.engine.text.engine.most_new_tokens(prompt.ids, prompt.cache_salt)
        if room < 1:
            raise ApiError(
                f"the prompt's {len(prompt.ids)} tokens leave no room for an answer: the model "
                f"and its cache have room for {len(prompt.ids) + room}",
                param=param,
                code="context_length_exceeded",
            )
        return room

    @contextlib.asynccontextmanager
    async def run(
        self,
        prompts: Sequence[CheckedPrompt],
        sampling: Sequence[SamplingParams],
        deadline: float | None,
        *,
        record_reads: bool = False,
    ) -> AsyncGenerator[AsyncIterable[tuple[int, TextDelta]]]:
        """Requests that run until the block ends; those that are not through then are cancelled.

        What comes of them is that of a ``RequestStream``.

        Raises ``ApiError`` (429) where the queue is full, and what ``TextEngine.submit`` raises.
        """
        wanted = sum(params.n for params in sampling)
        capacity = self.engine.text.engine.spec.max_num_seqs + self.options.max_queue
        if wanted > capacity:
            raise ApiError(f"{wanted} completions are more than the {capacity} that can wait here")
        # Those that are through count no more, though a slow client may still read what they said.
        there = len(self.engine.text.engine.unfinished) + self._coming
        if there + wanted > capacity:
            self.metrics.refused()
            raise ApiError(
                f"{there} completions wait or run already, of at most {capacity}",
                status=429,
                code="queue_full",
            )
        requests = list(zip(prompts, sampling, strict=True))
        deadline = self.options.deadline if deadline is None else deadline
        self._coming += wanted
        try:
            submitted = await self.engine.submit(
                requests, deadline=deadline, record_reads=record_reads
            )
        finally:
            self._coming -= wanted
        async with submitted as stream:
            yield self.metrics.watched(stream)


async def outputs(stream: AsyncIterable[tuple[int, TextDelta]]) -> list[RequestOutput]:
    """Of all its requests, in their order. Raises the error of one that ended with an error."""
    done: dict[int, RequestOutput] = {}
    async for position, delta in stream:
        if delta.output is not None:
            done[position] = delta.output
        if delta.error is not None:
            raise delta.error
    return [done[position] for position in sorted(done)]
