"""aiperf: a small run to its end, all requests and tokens counted.

python use_aiperf.py URL MODEL TOKENIZER
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from plain import MODEL, URL

REQUESTS, TOKENS = 12, 10

with tempfile.TemporaryDirectory() as folder:
    options = {
        "--model": MODEL,
        "--url": URL,
        "--endpoint-type": "chat",
        "--tokenizer": sys.argv[3],
        "--concurrency": 4,
        "--request-count": REQUESTS,
        "--synthetic-input-tokens-mean": 50,
        "--output-tokens-mean": TOKENS,
        "--extra-inputs": "ignore_eos:true",
        "--ui": "none",
        "--artifact-dir": folder,
    }
    command = [Path(sys.executable).parent / "aiperf", "profile", "--streaming"]
    command += ["--use-server-token-count", *(word for pair in options.items() for word in pair)]
    subprocess.run([str(word) for word in command], check=True)
    results = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    measured = json.loads((Path(folder) / "server_metrics_export.json").read_text())
assert results["is_complete"] and not results["error_summary"]
assert results["request_count"]["avg"] == REQUESTS
assert results["total_usage_completion_tokens"]["avg"] == REQUESTS * TOKENS
assert measured["summary"]["endpoints_successful"] == [f"{URL}/metrics"]
