"""What requests may hold, field by field (pydantic); names are OpenAI's, and vLLM's beside them.

A field that is not known is refused by name: it could change the answer. Those of ``HARMLESS``
are taken and left unread. ``null`` is the same as a field that is absent, as several clients send.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lserve_jax.checks import is_integer
from lserve_jax.sampling_params import SamplingParams
from lserve_jax.serve.errors import ApiError

# They name the caller, say how OpenAI should store and bill, or hint at what no model here has.
HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "reasoning_effort", "verbosity", "prediction", "request_id"),
        "priority",
    }
)
# Of these one value changes nothing, and clients send it; any other is refused.
_NEUTRAL = {
    "modalities": ["text"],
    "use_beam_search": False,
    "length_penalty": 1.0,
    "detokenize": True,
    "return_token_ids": False,
    "echo": False,
}
# Fields that go to SamplingParams as they are.
_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop"),
    *("stop_token_ids", "ignore_eos", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "skip_special_tokens", "include_stop_str_in_output"),
    *("logit_bias", "allowed_token_ids", "bad_words"),
)
# Each is looked for in every new piece of text.
_MOST_STOPS = 64

TokenIds = list[int]


class Body(BaseModel):
    """A JSON object whose fields are all known."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    _path: ClassVar[str] = ""  # where in a request's body it stands

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            raise ValueError("must be a JSON object")
        return {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _no_unknown_fields(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and (name not in _NEUTRAL or value != _NEUTRAL[name]):
                raise self.unknown(name)
        return self

    @classmethod
    def unknown(cls, name: str) -> ApiError:
        """What is said of a field that is not known."""
        name = cls._path + name
        return ApiError(
            f"field {name!r:.100} is not known here and could change the answer: leave it out",
            param=name,
            code="unknown_parameter",
        )


class StreamOptions(Body):
    """What a stream tells beside its text."""

    _path: ClassVar[str] = "stream_options."

    include_usage: bool = False  # of all tokens, in a chunk of its own at the end
    include_obfuscation: bool = False  # of no effect: chunks are not padded
    continuous_usage_stats: bool = False  # so far, in every chunk


class GenerationBody(Body):
    """What chats and completions have in common."""

    model: str | None = None  # None: the one that is served
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop: Any = ()  # SamplingParams says what it may be
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []

    deadline: Annotated[float, Field(gt=0)] | None = None  # seconds; then it ends as it is
    # Only prompts of one salt share what was computed.
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    # What the answer must be; ``response_format.py`` reads these.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not all(_is_token_id(key) for key in given):
            raise ValueError("must be an object of numbers by token id")
        return {int(key): bias for key, bias in given.items()}

    def sampling(self, *, max_tokens: int, **more: Any) -> SamplingParams:
        """Raises ``ValueError`` where ``SamplingParams`` does, which names the field first."""
        if isinstance(self.stop, list) and len(self.stop) > _MOST_STOPS:
            raise ApiError(
                f"stop has {len(self.stop)} strings, at most {_MOST_STOPS} can be", param="stop"
            )
        given = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams(max_tokens=max_tokens, **(given | more))

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None  # what else the template asks for by name
    record_reads: bool = False  # GET /v1/reads/{id} tells then what each token read

    # ``response_format.py`` reads these too; the last two are old names of the first two.
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _records_one_choice(self) -> "ChatBody":
        if self.record_reads and self.n > 1:
            raise ApiError(f"record_reads needs n=1, got n={self.n}", param="record_reads")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    # One or several, each text or token ids; a single one need not be in a list.
    prompt: list[str | TokenIds]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _no_best_of(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of != self.n:
            raise ApiError(
                f"best_of={self.best_of} must be n={self.n}: all completions are returned",
                param="best_of",
            )
        return self

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_list(cls, given: Any) -> Any:
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            prompts = [given] if all(is_integer(x) for x in given) else given
            if all(isinstance(p, str) or (p and _is_ids(p)) for p in prompts):
                return prompts
        raise ValueError("must be text, a list of token ids, or a list of either")


def _is_token_id(key: Any) -> bool:
    """Whether a key of a JSON object is a token id."""
    return key.isascii() and key.isdecimal() and len(key) < 10


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(is_integer(x) for x in value)
