"""guidellm: small runs of chats and of completions to their ends, all requests counted.

python use_guidellm.py URL MODEL TOKENIZER
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from plain import URL

REQUESTS, TOKENS = 12, 10

for path in ("/v1/chat/completions", "/v1/completions"):
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        options = {
            "--backend": f"kind=openai_http,target={URL},request_format={path}",
            "--profile": "kind=concurrent,streams=4",
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--data": f"kind=synthetic_text,prompt_tokens=50,output_tokens={TOKENS}",
            "--tokenizer": f"kind=huggingface_auto,model={sys.argv[3]}",
            "--output": f"kind=json,path={output}",
        }
        command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
        command += [word for pair in options.items() for word in pair]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        (benchmark,) = json.loads(output.read_text())["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert counts["successful"] == counts["total"] == REQUESTS, counts
    assert all(
        r["output_metrics"]["text_tokens"] == TOKENS for r in benchmark["requests"]["successful"]
    )
