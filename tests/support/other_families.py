"""Random models of families that are compared and never pruned, as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.data.tokenizer import train_bpe

CONTEXT, VOCAB_SIZE = 256, 300
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
# A window shorter than the texts: what its layers do beside full attention is seen.
GEMMA_2 = {**_SIZES, "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
PHI = {**_SIZES, "model_type": "phi", "num_key_value_heads": 4}
_TEXT = "the model reads what a student writes and a teacher says of it in words that are not many "


def make_model(directory: Path, values: dict[str, Any], **changes: Any) -> Any:
    """transformers' model in evaluation mode, saved with a tokenizer of 300 entries."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(directory)
    train_bpe([_TEXT * 20, " ".join(map(str, range(3000)))], VOCAB_SIZE, directory)
    return model


def own_questions(path: Path) -> Path:
    """Six questions of two choices each, as a task file."""
    rows = [{"question": f"import {n}", "choices": [" os", " x y z"], "answer": n % 2} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
