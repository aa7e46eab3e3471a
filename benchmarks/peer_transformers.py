"""transformers generating greedily, in its own environment: the other side of ``peer.py``.

    python benchmarks/peer_transformers.py CHECKPOINT

Reads JSON objects, one a line, from stdin: dtype, prompts (token ids), num_tokens and batch_size.
Prompts of a batch are padded on the left to the longest. Answers each with one JSON line: the token
ids of every prompt and the seconds they took. The first line out names the versions.
"""

import json
import platform
import sys
import time

import torch
import transformers

models = {
    name: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, name))
    for name in ("float32", "bfloat16")
}


def generate(model, prompts, num_tokens):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return output[:, longest:].tolist()


versions = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "peer_python": platform.python_version(),
}
print(json.dumps(versions), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    model, prompts, size = models[request["dtype"]], request["prompts"], request["batch_size"]
    started = time.perf_counter()
    token_ids = []
    for first in range(0, len(prompts), size):
        token_ids += generate(model, prompts[first : first + size], request["num_tokens"])
    seconds = time.perf_counter() - started
    print(json.dumps({"token_ids": token_ids, "seconds": seconds}), flush=True)
