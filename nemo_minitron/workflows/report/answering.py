"""A process that lets one checkpoint answer prompts: JSON on stdin, the answers as the last line of stdout."""

import json
import sys

from nemo_minitron.config.chat import ChatConfig, ChatRecipe
from nemo_minitron.config.recipes import DataConfig
from nemo_minitron.workflows.chat import engines
from nemo_minitron.workflows.chat.check import check


def answer(checkpoint: str, prompts: list[str], max_new_tokens: int, cache_dir: str | None) -> list[str]:
    """Greedy answers, as recipes/chat.py gives them: chat turns where the tokenizer has a template.

    Raises:
        InputError: no checkpoint, one that cannot be exported, or a prompt that its context does not hold.
    """
    chat = ChatConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    r = ChatRecipe(source=checkpoint, chat=chat, data=DataConfig(cache_dir=cache_dir))
    with engines.opened(r, check(r)) as engine:
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [engine.answer(talk, lambda _: None).text for talk in talks]


def main() -> None:
    """Read, answer, print."""
    asked = json.load(sys.stdin)
    found = answer(asked["checkpoint"], asked["prompts"], asked["max_new_tokens"], asked["cache_dir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
