#!/usr/bin/env bash
# The ids of added tokens in tokenizer.json are not used: tokenizers counts them out again.
#
# Seen 2026-11-27 with tokenizers 0.23.3.
#
# Each entry of "added_tokens" states an id. On loading, a token that is not in the model's vocabulary gets the number
# of tokens so far instead, in the order of the file. Nothing is raised and Python shows no warning. The two agree
# only where the vocabulary has no gap and the added tokens follow it at once.
# Seen, for a word-level vocabulary and one added token <end>:
#   vocabulary 0 1 2, <end> stated as 10   ->  <end> is 3, and id 10 is nothing
#   vocabulary 0 1 3, <end> stated as 4    ->  <end> is 3, the id of the word b: "b <end>" encodes to [3, 3],
#                                              and [3] decodes to <end>
#
# Why it matters: a vocabulary that was pruned, or padded so that the control tokens start at a round number, keeps
# its ids in the file and in the embedding, and loads with others. The model is then given the rows of other tokens,
# and its own end token is never recognised. A loader should compare token_to_id with the ids in the file.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages tokenizers==0.23.3

run <<'PY'
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers


def load(vocabulary, stated):
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<end>"])
    content = json.loads(made.to_str())
    content["model"]["vocab"] = vocabulary
    content["added_tokens"][0]["id"] = stated
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        sys.exit(f"Changed: such a file is now refused ({error}).")


far = load({"<unk>": 0, "a": 1, "b": 2}, 10)
print("stated 10, loaded as", far.token_to_id("<end>"), "and id 10 is", far.id_to_token(10))
gap = load({"<unk>": 0, "a": 1, "b": 3}, 4)
ids = gap.encode("b <end>").ids
print("stated 4 after a gap, loaded as", gap.token_to_id("<end>"), "so 'b <end>' is", ids,
      "and [3] decodes to", gap.decode([3], skip_special_tokens=False))

if far.token_to_id("<end>") != 3 or far.id_to_token(10) is not None:
    sys.exit("Changed: the stated id of an added token beyond the vocabulary is no longer replaced.")
if ids != [3, 3] or gap.decode([3], skip_special_tokens=False) != "<end>":
    sys.exit("Changed: an added token behind a gap no longer takes the id of a word.")
PY
