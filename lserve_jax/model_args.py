"""Options of the command lines that say which model runs, and how."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, SuppressFixed

from lserve_jax.attention.config import SparsityConfig
from lserve_jax.cli import Switch, flag, keep_compiled
from lserve_jax.llm import LLM


# Help texts stay within two lines each: tyro breaks longer ones in odd places.
@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """What the programs have in common that run one model."""

    model: Annotated[str, flag("MODEL", "smollm2-135m-instruct")] = "smollm2-135m-instruct"
    """smollm2-135m-instruct or smollm2-135m-instruct-32k (prompts of up to 32K tokens), a
    checkpoint directory, a .gguf file, or a Hugging Face id (owner/name)."""
    adapter: Annotated[str | None, flag("DIR", "none")] = None
    """Directory of a PEFT LoRA adapter to merge into the weights."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        flag("{float32,bfloat16}", "bfloat16 on a GPU, float32 on a CPU"),
    ] = None
    """Type of weights and arithmetic."""
    max_model_len: Annotated[int | None, flag("INT", "what the model was trained for")] = None
    """Room for prompt and answer together, in tokens."""
    kv_cache_bytes: Annotated[int | None, flag("INT", "2 GiB on a CPU, most of a GPU")] = None
    """Memory for the cached keys and values; long prompts need more."""
    kv_dtype: Literal["auto", "int8", "fp8", "int4"] = "auto"
    """Storage of keys and values: as --dtype, or quantised to 8 or 4 bits a number."""
    weights: Annotated[
        Literal["int8", "int4", "fp8", "checkpoint"] | None,
        flag("{int8,int4,fp8,checkpoint}", "as --dtype"),
    ] = None
    """Quantise weights at load, or keep a checkpoint's own codes: less memory."""
    weight_group: int = 32
    """Inputs that share a scale in int4, of --weights and --draft-weights: 32, 64 or 128."""
    prefill_dtype: Annotated[
        Literal["int8", "fp8"] | None, flag("{int8,fp8}", "as the weights")
    ] = None
    """Read prompts by products of 8 bits on both sides: faster, at some cost in quality."""
    prefill_chunk_size: int = 8192
    """Most prompt tokens that run at once. With quantised keys and with block-sparse prefill only
    whole chunks are remembered."""
    prefix_cache: Annotated[bool, flag("", "remember")] = True
    """Remember prompts, so that one that begins alike goes on from there, or forget them."""
    host_cache_bytes: int = 0
    """Memory of the host for remembered prompts that the KV cache has no room for any more."""
    attention: Literal["dense", "lserve"] = "dense"
    """dense reads the whole context at every token; lserve reads the parts that matter."""
    exact: Switch = False
    """With --attention lserve: it only drafts, and dense attention verifies: dense answers."""
    draft: Literal["sparse", "ngram"] = "sparse"
    """Where --exact has its drafts from: sparse steps, or what followed the same words before."""
    draft_weights: Annotated[
        Literal["int8", "int4", "fp8"] | None, flag("{int8,int4,fp8}", "the weights")
    ] = None
    """Quantise weights at load for the sparse steps that draft, beside those that verify."""
    max_draft_tokens: int = 7
    """Most tokens that are drafted before they are verified."""
    sparsity: SuppressFixed[OmitArgPrefixes[SparsityConfig]] = field(default_factory=SparsityConfig)
    """Only with --attention lserve. Sizes are in tokens."""

    backend: Literal["auto", "mosaic", "reference"] = "auto"
    """mosaic: kernels for Hopper GPUs; reference: plain JAX; auto: the kernels where they run."""
    cache: Annotated[bool, flag("", "kept")] = True
    """Keep compiled programs for the next start, or compile anew and keep nothing."""
    warmup: Literal["none", "auto", "full"] = "none"
    """Compile before anything runs: what a short request alone needs, or all usual shapes."""

    def load(self, **options: Any) -> LLM:
        """The model, with ``options`` of ``LLM`` beside these.

        Raises ``ValueError`` where options contradict each other, and where ``LLM`` does.
        """
        sparsity_given = self.sparsity != SparsityConfig()
        if self.attention == "dense" and sparsity_given:
            raise ValueError("the options of lserve attention need --attention lserve")
        if self.max_draft_tokens != ModelArgs.max_draft_tokens and not self.exact:
            raise ValueError(f"--max-draft-tokens {self.max_draft_tokens} needs --exact")
        if self.draft_weights is not None and not self.exact:
            raise ValueError(f"--draft-weights {self.draft_weights} needs --exact")
        if self.draft == "ngram" and sparsity_given:
            raise ValueError(
                "--draft ngram has no sparse steps for the options of lserve attention"
            )
        return LLM(
            self.model,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            kv_cache_bytes=self.kv_cache_bytes,
            attention=self.attention,
            sparsity=self.sparsity if self.attention == "lserve" and sparsity_given else None,
            exact=self.exact,
            draft=self.draft,
            draft_weights=self.draft_weights,
            max_draft_tokens=self.max_draft_tokens,
            enable_prefix_caching=self.prefix_cache,
            host_cache_bytes=self.host_cache_bytes,
            kv_dtype=self.kv_dtype,
            weights=self.weights,
            weight_group=self.weight_group,
            prefill_dtype=self.prefill_dtype,
            prefill_chunk_size=self.prefill_chunk_size,
            backend=self.backend,
            compilation_cache=keep_compiled(self.cache),
            warmup=self.warmup,
            adapter=self.adapter,
            progress=sys.stderr.isatty(),  # elsewhere a bar is lines of a log
            **options,
        )
