"""Prints what NeMo's own chat preprocessing makes of conversations: nemo_chat_format.py < cases.json > ids.json

A case is [tokenizer directory, special tokens, conversation in NeMo's format].
"""

import json
import sys
from typing import Any

from nemo_minitron import cpu_compat


def ids(directory: str, special: dict[str, str], source: dict[str, Any]) -> dict[str, list[int]]:
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import preprocess

    tokenizer = AutoTokenizer(directory)
    end_of_name, label_start, turn_start = (
        tokenizer.text_to_ids(special[name]) for name in ("end_of_name", "label_start", "turn_start")
    )
    found = preprocess(source, tokenizer, end_of_name, label_start, special, len(turn_start))
    return {"input_ids": found["input_ids"].tolist(), "mask": found["mask"].int().tolist()}


if __name__ == "__main__":
    cpu_compat.prepare_nemo()
    print(json.dumps([ids(*case) for case in json.load(sys.stdin)]))
