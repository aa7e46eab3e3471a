"""Writes the tiny checkpoints beside this file with compressed-tensors, the library itself.

    pip install torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 safetensors
    python tests/convert/quantised/make_compressed_tensors.py

Each holds, beside its own files, ``expected.npz``: the library's own dequantised weights in
float32, and logits of them for some tokens.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


def args(**settings) -> QuantizationArgs:
    return QuantizationArgs(**settings)


int4 = {"num_bits": 4, "type": "int", "strategy": "group"}
CASES = {
    "ct-pack-int4-g32": args(**int4, group_size=32, symmetric=True),
    "ct-pack-int4-g64": args(**int4, group_size=64, symmetric=True),
    "ct-pack-int4-g32-asym": args(**int4, group_size=32, symmetric=False),
    "ct-pack-int8": args(num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct-int8-channel": args(num_bits=8, type="int", strategy="channel", symmetric=True),
    "ct-fp8-channel": args(num_bits=8, type="float", strategy="channel", symmetric=True),
    "ct-fp8-tensor": args(num_bits=8, type="float", strategy="tensor", symmetric=True),
    "ct-fp8-block": args(
        num_bits=8, type="float", strategy="block", block_structure=[128, 128], symmetric=True
    ),
}
ACTIVATIONS = {
    "ct-int8-channel": args(num_bits=8, type="int", strategy="token", dynamic=True),
    "ct-fp8-channel": args(num_bits=8, type="float", strategy="token", dynamic=True),
    "ct-fp8-tensor": args(num_bits=8, type="float", strategy="token", dynamic=True),
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
        )
    ).to(torch.float32)


def set_scales(module: torch.nn.Linear, scheme: QuantizationScheme) -> None:
    """Round to nearest, by the library's own observer-free formula."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weights, w = scheme.weights, module.weight.data
    strategy = weights.strategy
    if strategy == "tensor":
        low, high = w.min().reshape(1), w.max().reshape(1)
    elif strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    elif strategy == "group":
        g = w.reshape(w.shape[0], -1, weights.group_size)
        low, high = g.amin(2), g.amax(2)
    else:
        tall, wide = weights.block_structure
        rows, columns = -(-w.shape[0] // tall), -(-w.shape[1] // wide)
        low, high = torch.zeros(rows, columns), torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                block = w[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
                low[i, j], high[i, j] = block.min(), block.max()
    scale, zero = calculate_qparams(low, high, weights)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(
        module.weight_scale.shape
    )
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype).reshape(
            module.weight_zero_point.shape
        )


def main() -> None:
    for name, weights in CASES.items():
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model = tiny()
        scheme = QuantizationScheme(
            targets=["Linear"], weights=weights, input_activations=ACTIVATIONS.get(name)
        )
        group = weights.group_size or 1
        ignore = ["lm_head"]
        # Inputs that no group divides stay as they are.
        ignore += [f"re:.*{x}" for x, n in (("o_proj", 64), ("down_proj", 96)) if n % group]
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
        if name == "ct-pack-int8":
            config.format = "pack-quantized"
        apply_quantization_config(model, config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and getattr(module, "quantization_scheme", None):
                set_scales(module, module.quantization_scheme)
                module.quantization_status = "frozen"
        compressor = ModelCompressor.from_pretrained_model(
            model, quantization_format="pack-quantized" if "pack" in name else None
        )
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(directory)
        compressor.decompress_model(model)
        expected = {
            key: value.detach().float().numpy()
            for key, value in model.state_dict().items()
            if key.endswith(".weight")
        }
        plain = tiny()
        plain.load_state_dict({k: torch.tensor(v) for k, v in expected.items()}, strict=False)
        with torch.no_grad():
            logits = plain(torch.tensor(TOKENS)).logits[0].numpy()
        np.savez_compressed(directory / "expected.npz", tokens=np.array(TOKENS), logits=logits)
        (directory / "generation_config.json").unlink(missing_ok=True)
        said = json.loads((directory / "config.json").read_text())["quantization_config"]
        print(name, said["format"], sum(p.stat().st_size for p in directory.iterdir()))


if __name__ == "__main__":
    main()
