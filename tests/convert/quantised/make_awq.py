"""Writes the tiny AWQ checkpoint beside this file with AutoAWQ's own packing and unpacking.

    pip install torch==2.13.0 transformers==5.24.0 accelerate safetensors
    pip download --no-deps --no-build-isolation autoawq==0.2.9; tar xzf autoawq-0.2.9.tar.gz
    python tests/convert/quantised/make_awq.py autoawq-0.2.9

The package itself needs a GPU to install; the two modules used here do not. ``expected.npz`` holds
logits of the library's dequantised weights in float32.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make_compressed_tensors import HERE, TOKENS, tiny
from safetensors.torch import save_file


def main(source: str) -> None:
    package = types.ModuleType("awq")  # its own __init__ imports all of AutoAWQ
    package.__path__ = [str(Path(source) / "awq")]
    sys.modules["awq"] = package
    for name in ("awq.modules", "awq.modules.linear"):
        part = types.ModuleType(name)
        part.__path__ = [str(Path(source, *name.split(".")))]
        sys.modules[name] = part
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    model, group = tiny(), 32
    tensors, plain = {}, {}
    for name, weight in model.state_dict().items():
        linear = name.removesuffix(".weight")
        if not name.endswith("proj.weight"):
            tensors[name] = plain[name] = weight
            continue
        module = model.get_submodule(linear)
        grouped = module.weight.data.reshape(module.out_features, -1, group)
        low, high = grouped.amin(2), grouped.amax(2)
        scale = ((high - low) / 15).half()
        zero = torch.clamp(torch.round(-low / scale), 0, 15)
        # Rounded to what 4 bits hold first, so that packing is all that the library does.
        codes = torch.clamp(torch.round(grouped / scale[..., None]) + zero[..., None], 0, 15)
        module.weight.data = (
            ((codes - zero[..., None]) * scale[..., None]).reshape(module.weight.shape).float()
        )
        packed = WQLinear_GEMM.from_linear(
            module, 4, group, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
        )
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{linear}.{part}"] = getattr(packed, part).cpu().contiguous()
        back = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group)
        plain[name] = back.T.float().cpu().contiguous()
    directory = HERE / "awq-g32"
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    reference = tiny()
    reference.load_state_dict(plain)
    with torch.no_grad():
        logits = reference(torch.tensor(TOKENS)).logits[0].numpy()
    np.savez_compressed(directory / "expected.npz", tokens=np.array(TOKENS), logits=logits)


if __name__ == "__main__":
    main(sys.argv[1])
