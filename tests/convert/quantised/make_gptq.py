"""Writes the tiny GPTQ checkpoints beside this file with GPTQModel's own packing.

    pip install torch==2.13.0 transformers==5.24.0 safetensors threadpoolctl
    pip download --no-deps --no-build-isolation gptqmodel==7.7.0; tar xzf gptqmodel-7.7.0.tar.gz
    python tests/convert/quantised/make_gptq.py gptqmodel-7.7.0

The package needs a compiler to install. Its function that packs and the one that turns version 2
into version 1 are plain; they are taken out of its sources here and run on a stand-in module.
``expected.npz`` holds logits of the weights that were packed, which their codes represent exactly.
"""

import ast
import contextlib
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from make_compressed_tensors import HERE, TOKENS, tiny
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.conv import _ConvNd


def function_of(path: Path, name: str, **known) -> types.FunctionType:
    """A function of a source file, without the rest of it."""
    tree = ast.parse(path.read_text())
    node = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == name)
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    scope = {"math": math, "np": np, "nn": nn, "t": torch, "torch": torch, **known}
    exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    return scope[name]


CASES = {
    "gptq-int4-g32": {"bits": 4, "group": 32, "form": "gptq", "act_order": False},
    "gptq-v2-int4-g32-act-order": {"bits": 4, "group": 32, "form": "gptq_v2", "act_order": True},
    "gptq-int8-g64": {"bits": 8, "group": 64, "form": "gptq", "act_order": False},
}


def main(source: str) -> None:
    limits = types.SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    pack = function_of(
        Path(source, "gptqmodel/nn_modules/qlinear/__init__.py"),
        "pack_original",
        THREADPOOLCTL=limits,
        transformers=transformers,
        _ConvNd=_ConvNd,
    )
    log = types.SimpleNamespace(info=types.SimpleNamespace(once=lambda _: None))
    to_version_1 = function_of(
        Path(source, "gptqmodel/utils/model.py"),
        "convert_gptq_v2_to_v1_format_module",
        BaseQuantLinear=nn.Module,
        log=log,
    )

    class StandIn(nn.Module):
        planar, pack_dtype, pack_dtype_bits = False, torch.int32, 32
        pack_np_math_dtype, pack_np_dtype = np.uint32, np.int32

        def qzero_format(self, format: int) -> None:
            del format

    for name, case in CASES.items():
        bits, group, most = case["bits"], case["group"], (1 << case["bits"]) - 1
        model = tiny()
        tensors, plain = {}, {}
        for key, weight in model.state_dict().items():
            module_name = key.removesuffix(".weight")
            if not key.endswith("proj.weight") or weight.shape[1] % group:
                tensors[key] = plain[key] = weight
                continue
            linear = model.get_submodule(module_name)
            out, inputs = linear.weight.shape
            generator = torch.Generator().manual_seed(len(key))
            order = torch.arange(inputs)
            if case["act_order"]:
                order = torch.randperm(inputs, generator=generator)
            g_idx = torch.empty(inputs, dtype=torch.int32)
            g_idx[order] = (torch.arange(inputs) // group).to(torch.int32)
            # Zero points of 0: version 1 stores each less one, so these borrow from a neighbour.
            linear.weight.data[::5].abs_()
            grouped = linear.weight.data[:, order].reshape(out, -1, group)
            low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
            scale = ((high - low) / most).half().float()
            zero = torch.clamp(torch.round(-low / scale), 0, most)
            of_input = g_idx.long()
            codes = torch.round(linear.weight.data / scale[:, of_input]) + zero[:, of_input]
            codes = torch.clamp(codes, 0, most)
            linear.weight.data = (codes - zero[:, of_input]) * scale[:, of_input]
            packed = StandIn()
            packed.bits, packed.maxq, packed.pack_factor = bits, most, 32 // bits
            pack(packed, linear, scale, zero, g_idx)
            if case["form"] == "gptq":
                to_version_1(packed, types.SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                tensors[f"{module_name}.{part}"] = getattr(packed, part).contiguous()
            plain[key] = linear.weight.data.contiguous()
        directory = HERE / name
        directory.mkdir(exist_ok=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict()
        config["architectures"] = ["LlamaForCausalLM"]
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": case["act_order"],
            "sym": False,
            "checkpoint_format": case["form"],
            "lm_head": False,
        }
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        reference = tiny()
        reference.load_state_dict(plain)
        with torch.no_grad():
            logits = reference(torch.tensor(TOKENS)).logits[0].numpy()
        np.savez_compressed(directory / "expected.npz", tokens=np.array(TOKENS), logits=logits)


if __name__ == "__main__":
    main(sys.argv[1])
