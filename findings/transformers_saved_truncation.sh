#!/usr/bin/env bash
# transformers saves the truncation of the last call into tokenizer.json, where only others obey it.
#
# Seen 2026-11-27 with transformers 5.24.0, tokenizers 0.23.3 (no torch).
#
# Truncation is an argument of one call, yet the call leaves it set in the tokenizer below, and save_pretrained writes
# that one's state to tokenizer.json. transformers itself clears it at each call, so there the folder looks right;
# a program that loads the same tokenizer.json with tokenizers gets its prompts cut. Padding goes the same way.
# Seen, for a text of six tokens, after one call with truncation=True, max_length=3 and save_pretrained:
#   tokenizer.json              "truncation": {"direction": "Right", "max_length": 3, ...}   (null before the call)
#   AutoTokenizer               6 ids
#   tokenizers.Tokenizer        3 ids, no error and no warning
#   saved again after a plain call: null
#
# Why it matters: a training script calls its tokenizer with truncation and then saves model and tokenizer together.
# The server of that checkpoint silently drops all but the start of each long prompt, while a check against
# transformers shows nothing. Call no_truncation() and no_padding() after loading.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages transformers==5.24.0 tokenizers==0.23.3

run <<'PY'
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
text = "a b a b a b"


def saved(folder):
    tokenizer.save_pretrained(folder)
    with open(f"{folder}/tokenizer.json") as file:
        return json.load(file)["truncation"]


before = saved("before")
tokenizer(text, truncation=True, max_length=3)
after = saved("after")
there = AutoTokenizer.from_pretrained("after")(text).input_ids
here = Tokenizer.from_file("after/tokenizer.json").encode(text).ids
tokenizer(text)
again = saved("again")
print("truncation saved before the call:", before, "\nafter it:", after, "\nafter a plain call:", again)
print("AutoTokenizer:", there, "\ntokenizers:   ", here)

if before is not None or again is not None:
    sys.exit("Changed: truncation is saved even without a call that asked for it.")
if after is None or after["max_length"] != 3 or len(here) != 3:
    sys.exit("Changed: the truncation of a call is no longer saved and obeyed by tokenizers.")
if len(there) != 6:
    sys.exit("Changed: AutoTokenizer now obeys the saved truncation as tokenizers does.")
PY
