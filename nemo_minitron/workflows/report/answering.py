"""A process that lets one checkpoint answer prompts: JSON on stdin, the answers as the last line of stdout."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from nemo_minitron.checkpoints.source import find_source
from nemo_minitron.export import huggingface
from nemo_minitron.nemo.huggingface import exported_once, load_huggingface


def answer(checkpoint: str, prompts: list[str], max_new_tokens: int, cache: Path) -> list[str]:
    """Greedy answers, as chat turns where the tokenizer has a template.

    Raises:
        InputError: no checkpoint, or one that cannot be exported.
    """
    directory = exported_once(find_source(checkpoint), cache)
    source = find_source(directory)
    tokenizer = huggingface.load_tokenizer(directory, source.architecture.vocab_size)
    settings = huggingface.generation_settings(directory, source.architecture.vocab_size)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=settings.get("eos_token_id"),
        pad_token_id=settings.get("pad_token_id", 0),
    )
    model = load_huggingface(source)
    model = model.cuda() if torch.cuda.is_available() else model.float()
    return [_answer(model, tokenizer, prompt, greedy) for prompt in prompts]


def _answer(model: Any, tokenizer: Any, prompt: str, greedy: Any) -> str:
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = tokenizer.encode(prompt)
    given = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        whole = model.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
    return str(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))


def main() -> None:
    """Read, answer, print."""
    asked = json.load(sys.stdin)
    found = answer(asked["checkpoint"], asked["prompts"], asked["max_new_tokens"], Path(asked["cache"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
