"""lserve-jax as a model of EleutherAI's lm-evaluation-harness (extra ``eval``).

    import lm_eval
    from lserve_jax import LLM, SparsityConfig
    from lserve_jax.eval.lm_eval import LServeLM

    sparsity = SparsityConfig(token_budget=2048)
    llm = LLM("Qwen/Qwen3-0.6B", attention="lserve", sparsity=sparsity, relay="never")
    lm_eval.simple_evaluate(LServeLM(llm), tasks=["longbench_qasper"], apply_chat_template=True)

Importing this module also registers the name ``lserve_jax``, whose arguments are the model, keys of
a setting (``lserve_jax.eval.settings``) and some of ``LLM``'s own:

    lm_eval.simple_evaluate("lserve_jax", model_args="model=…,attention=lserve,budget=2048", …)

Log likelihoods come from ``LLM.score`` where attention is dense. Else they come from decode steps
alone (``lserve_jax.engine.scoring``), so that they show what the sparse path does even where a
continuation has one token.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from lserve_jax.engine.judging import is_judged_by_prefill
from lserve_jax.engine.scoring import score
from lserve_jax.eval.settings import parse_settings
from lserve_jax.llm import LLM
from lserve_jax.sampling_params import SamplingParams

# Arguments of the registered name that go to LLM as they are; "model" and "attention" come first.
_LLM_ARGUMENTS = (
    *("dtype", "max_model_len", "max_num_seqs", "kv_dtype", "kv_cache_bytes", "backend"),
    *("adapter", "seed", "weights", "weight_group"),
)
# What a task may ask of generation beside its length and its end.
_SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("lserve_jax")
class LServeLM(TemplateLM):
    """An ``LLM`` behind the harness's interface.

    Make it with ``relay="never"``, as the registered name does. The harness gives prompts in groups
    that begin with the same examples: relay attends such a prefix whole, so sparse attention would
    seem better than it is for a request by itself.

    Prompts that are too long lose their beginning, as with the harness's other models.
    ``max_gen_toks`` is the length of an answer whose task does not say.

    Raises ``ValueError`` for an ``LLM`` without a tokenizer or without an end-of-text token.
    """

    def __init__(self, llm: LLM, *, max_gen_toks: int = 256):
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError("the harness gives text, but the model has no tokenizer")
        if not llm.engine.eos_token_ids:
            raise ValueError("the harness needs an end-of-text token, but the model has none")
        self.llm, self.max_gen_toks = llm, max_gen_toks
        self._tokenizer = llm.tokenizer
        self.tokenizer = llm.tokenizer  # the harness looks here for the chat template

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "LServeLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LServeLM":
        """``additional_config``, the harness's batch size and device, is up to the engine here."""
        given = dict(arg_dict)
        if "model" not in given:
            raise ValueError(f"the arguments must have model=..., got {arg_dict}")
        model, kind = given.pop("model"), given.pop("attention", "dense")
        rest = {key: given.pop(key) for key in _LLM_ARGUMENTS if key in given}
        keys = ",".join(f"{key}={value}" for key, value in given.items())
        (setting,) = parse_settings([f"{kind}:{keys}" if keys else kind])
        if setting.control is not None:
            raise ValueError(f"control={setting.control} is for python -m lserve_jax.eval only")
        return cls(LLM(model, relay="never", sparsity=setting.sparsity, **setting.options, **rest))

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def eot_token_id(self) -> int:
        return self.llm.engine.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Differs between tokenizers and templates: the harness keeps its requests under it."""
        text = f"{self._tokenizer.backend.to_str()}{self._tokenizer.chat_template}"
        return f"lserve_jax-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Without ``add_generation_prompt`` the last message is the beginning of the answer.

        Raises ``ValueError`` where ``Tokenizer.apply_chat_template`` does.
        """
        return self._tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        if add_special_tokens is None:  # a chat template writes BOS itself
            bos = self._tokenizer.markers.get("bos_token")
            add_special_tokens = bos is None or not string.startswith(bos)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log probability of the continuation, whether greedy decoding would have made it)."""
        results = []
        step = 32 * self.llm.spec.max_num_seqs  # so that few rows, or slots, are idle
        quiet = kwargs.get("disable_tqdm", False)
        for first in tqdm(range(0, len(requests), step), disable=quiet, desc="scoring"):
            batch = requests[first : first + step]
            for request, result in zip(batch, self._score([r[1:] for r in batch]), strict=True):
                self.cache_hook.add_partial("loglikelihood", request[0], result)
                results.append(result)
        return results

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        prompts = [self._shortened(context, len(ids)) for context, ids in pairs]
        continuations = [ids for _, ids in pairs]
        if is_judged_by_prefill(self.llm.engine):
            given = [{"prompt_token_ids": prompt} for prompt in prompts]
            scores = self.llm.score(given, continuations)
        else:
            scores = score(self.llm.engine, prompts, continuations)
        return [
            (float(new.logprobs.sum()), new.likeliest.tolist() == ids)
            for (_, ids), new in zip(pairs, scores, strict=True)
        ]

    def _shortened(self, context: list[int], room_for: int) -> list[int]:
        """The end of a context that leaves room for so many tokens, at least one token of it."""
        return context[-max(self.max_length - room_for, 1) :]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # a window's first token is context
                context_len=1,
            )
            parts = self._score([make_disjoint_window(window) for window in windows])
            totals.append(sum(logprob for logprob, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, sampling = [], []
        for request in requests:
            context, wanted = request.args
            params = self._sampling_params(wanted)
            ids = self._shortened(self.tok_encode(context), params.max_tokens)
            prompts.append({"prompt_token_ids": ids})
            sampling.append(params)
        texts = []
        step = 4 * self.llm.spec.max_num_seqs  # so that slots are rarely idle
        for first in tqdm(range(0, len(prompts), step), disable=disable_tqdm, desc="generating"):
            outputs = self.llm.generate(
                prompts[first : first + step], sampling[first : first + step]
            )
            for request, output in zip(requests[first : first + step], outputs, strict=True):
                texts.append(output.outputs[0].text)
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _sampling_params(self, wanted: dict[str, Any]) -> SamplingParams:
        """Raises ``ValueError`` for an argument that is not known, rather than drop it."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(wanted, self.max_gen_toks))
        stop, max_tokens = given.pop("until"), given.pop("max_gen_toks")
        given.setdefault("temperature", 1.0 if given["do_sample"] else 0.0)
        del given["do_sample"]  # the temperature says it
        if unknown := set(given) - set(_SAMPLING_ARGUMENTS):
            raise ValueError(f"generation arguments {sorted(unknown)} are not supported")
        stop = [text for text in stop if text]
        return SamplingParams(stop=stop, max_tokens=max_tokens, **given)
