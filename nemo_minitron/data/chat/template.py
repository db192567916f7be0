"""Chat templates: Jinja in a tokenizer's `tokenizer_config.json`, as Hugging Face keeps them.

One string serves training, evaluation and export: it lies with the tokenizer. What templates make of conversations is
in `data.chat.encoding`.
"""

import json
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.data.chat.encoding import PROBE, encode_conversation, simplest, stop_tokens, token_ids
from nemo_minitron.data.rendering import render, try_template
from nemo_minitron.errors import InputError
from nemo_minitron.files import read_text, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The default. Each turn begins with the end-of-text token, which in packed pretraining text stands before every
# document and which every tokenizer here has; the one after an answer ends it, and is the answer's own. It is the
# format of NeMo's GPTSFTChatDataset with system_turn_start = turn_start = eos, end_of_name = "\n" and end_of_turn = "",
# down to the turn start that NeMo puts after the last answer, and to the system turn that it always writes
# (nemo/collections/nlp/data/language_modeling/megatron/gpt_sft_chat_dataset.py@2.4.1).
CHAT_TEMPLATE = (
    "{%- set ns = namespace(open=true) -%}"
    "{%- set has_system = messages and messages[0]['role'] == 'system' -%}"
    "{{- eos_token + 'System\\n' + (messages[0]['content'] if has_system else '') -}}"
    "{%- for message in (messages[1:] if has_system else messages) -%}"
    "{%- if message['role'] not in ('user', 'assistant', 'tool') -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- if ns.open -%}{{- eos_token -}}{%- endif -%}"
    "{{- message['role'] | capitalize + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- set ns.open = false -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- set ns.open = true -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- (eos_token if ns.open else '') + 'Assistant\\n' -}}"
    "{%- endif -%}"
)
CONFIG = "tokenizer_config.json"


def attach_template(directory: str | Path, template: str | None = None) -> str:
    """Give a tokenizer directory a chat template if it has none, and return the one that it has then.

    Args:
        directory: of a Hugging Face tokenizer; its `tokenizer_config.json` is written atomically.
        template: Jinja; null: `CHAT_TEMPLATE`.

    Raises:
        InputError: no tokenizer there, or one with another template than the given one.
    """
    path = Path(directory) / CONFIG
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    present = config.get("chat_template")
    if present is not None:
        if template is not None and present != template:
            raise InputError(f"{path}: has another chat template than the one that is to be attached")
        return str(present)
    config["chat_template"] = template or CHAT_TEMPLATE
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return str(config["chat_template"])


def with_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> "PreTrainedTokenizerBase":
    """The tokenizer, with `CHAT_TEMPLATE` if it has no template, after `check_template`; `save_pretrained` keeps it.

    Raises:
        InputError: as `check_template`.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    check_template(tokenizer, where)
    return tokenizer


def check_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
    """Refuse a template that cannot be trained and decoded with.

    A question and its answer must render, their tokens must give all of the text back, the answer's prompt must be the
    beginning of what goes on from it, and the answer must have an end marker. What else a template does not take, such
    as a system's message, is for the samples that have it.

    Args:
        where: what a refusal begins with, such as a tokenizer's directory.

    Raises:
        InputError: which of these does not hold.
    """
    try_template(tokenizer, [PROBE, PROBE[1:], PROBE[:3], PROBE[1:3]], where)
    messages = simplest(tokenizer, where)
    text = render(tokenizer, messages, where)
    tokens = token_ids(tokenizer, text)
    decoded = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    unknown = tokenizer.unk_token_id
    # Some tokenizers call the end of a text unknown too; what the template writes itself is meant.
    if unknown is not None and tokens.count(unknown) > text.count(str(tokenizer.unk_token)):
        decoded = tokenizer.decode(tokens)
    elif _letters(decoded) == _letters(text):
        encode_conversation(tokenizer, messages, where)
        stop_tokens(tokenizer, where)
        return
    raise InputError(
        f"{where}: the chat template writes text that the tokenizer cannot encode: {text[:80]!r} comes back as "
        f"{decoded[:80]!r}"
    )


def _letters(text: str) -> str:
    """What must come back of a text: SentencePiece loses blanks beside control tokens, others case and width."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
