"""What transformers and PEFT make of checkpoints: a script, run by test_export_transformers.py.

Arguments: IDS.npy OUTPUT.npz DIRECTORY[+ADAPTER] … ; the output holds float32 logits by directory.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

tokens = torch.tensor(np.load(sys.argv[1]).astype(np.int64))
found = {}
for name in sys.argv[3:]:
    directory, _, adapter = name.partition("+")
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found[name] = model.eval()(tokens).logits.numpy()
np.savez(sys.argv[2], **found)
