"""The forms of the field's chat templates, written here anew, and tokenizers that have what they need."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"

# What a template says of a message, {ROLE}, {TEXT}; answers lie between marks.
TEXT, MARK, END = "{{- m['content'] | trim -}}", "{%- generation -%}", "{%- endgeneration -%}"
GEMMA = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 is even) -%}{{- raise_exception('must alternate') -}}{%- endif -%}"
    "{%- if m['role'] == 'assistant' -%}"
    "{{- '<start_of_turn>model\n' -}}" + MARK + TEXT + "{{- '<end_of_turn>' -}}" + END + "{{- '\n' -}}"
    "{%- else -%}{{- '<start_of_turn>user\n' -}}" + TEXT + "{{- '<end_of_turn>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
MISTRAL_01 = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' and loop.index0 is even -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}"
    "{%- elif m['role'] == 'assistant' and loop.index0 is odd -%}"
    + MARK
    + "{{- ' ' + m['content'] + eos_token -}}"
    + END
    + "{%- else -%}{{- raise_exception('Only user and assistant roles are supported!') -}}{%- endif -%}{%- endfor -%}"
)
# The system's text goes into the last user's turn, wherever that is by then.
MISTRAL_03 = (
    "{%- set ns = namespace(rest=messages, system='') -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set ns.rest = messages[1:] -%}{%- set ns.system = messages[0]['content'] + '\n\n' -%}{%- endif -%}"
    "{%- set last = (ns.rest | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
    "{{- bos_token -}}{%- for m in ns.rest -%}"
    "{%- if m['role'] == 'user' -%}"
    "{{- '[INST] ' + (ns.system if m == last else '') + m['content'] + '[/INST]' -}}"
    "{%- else -%}" + MARK + "{{- ' ' + m['content'] + eos_token -}}" + END + "{%- endif -%}{%- endfor -%}"
)
LLAMA_3 = (
    "{{- bos_token -}}{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}"
    "{%- set ns = namespace(rest=messages, system='') -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set ns.rest = messages[1:] -%}{%- set ns.system = messages[0]['content'] | trim -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' + ns.system + '<|eot_id|>' -}}"
    "{%- for m in ns.rest -%}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' -}}"
    "{%- if m['role'] == 'assistant' -%}" + MARK + TEXT + "{{- '<|eot_id|>' -}}" + END + "{%- else -%}"
    "{{- m['content'] | trim + '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
# Answers before the last question lose their thoughts; the last one is shown with them, even if they are empty.
QWEN_3 = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- set parts = m['content'].split('</think>') -%}"
    "{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' -%}"
    + MARK
    + "{%- if loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- parts[-1].lstrip('\n') + '<|im_end|>' -}}" + END + "{%- else -%}"
    "{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# What ends a conversation comes after what ends its last answer.
PHI_3 = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' -}}"
    "{%- if m['role'] == 'assistant' -%}" + MARK + "{{- m['content'] + '<|end|>' -}}" + END + "{{- '\n' -}}"
    "{%- else -%}{{- m['content'] + '<|end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}"
)
# The last answer ends with another token than those before it.
TWO_ENDS = (
    "{%- for m in messages -%}{{- '<|start|>' + m['role'] + '<|message|>' -}}"
    "{%- if m['role'] == 'assistant' -%}"
    + MARK
    + "{{- m['content'] + ('<|return|>' if loop.last else '<|end|>') -}}"
    + END
    + "{%- else -%}{{- m['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant<|message|>' -}}{%- endif -%}"
)
ZEPHYR = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' -}}"
    "{%- if m['role'] == 'assistant' -%}" + MARK + "{{- m['content'] + eos_token -}}" + END + "{{- '\n' -}}"
    "{%- else -%}{{- m['content'] + eos_token + '\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
# The system's text lies in the first user's turn, between marks of its own.
LLAMA_2 = (
    "{%- set ns = namespace(rest=messages, system='') -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set ns.rest = messages[1:] -%}"
    "{%- set ns.system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}{%- endif -%}"
    "{%- for m in ns.rest -%}"
    "{%- if m['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + (ns.system if loop.first else '') + m['content'].strip() + ' [/INST]' -}}"
    "{%- else -%}"
    + MARK
    + "{{- ' ' + m['content'].strip() + ' ' + eos_token -}}"
    + END
    + "{%- endif -%}{%- endfor -%}"
)
SPECIAL = {
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral 0.1": ["<s>", "</s>"],
    "mistral 0.3": ["<s>", "</s>", "[INST]", "[/INST]"],
    "llama 3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen 3": ["<|im_start|>", "<|im_end|>"],
    "phi 3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "two ends": ["<|start|>", "<|message|>", "<|end|>", "<|return|>"],
}
FORMS = {
    "gemma": GEMMA,
    "mistral 0.1": MISTRAL_01,
    "mistral 0.3": MISTRAL_03,
    "llama 3": LLAMA_3,
    "qwen 3": QWEN_3,
    "phi 3": PHI_3,
    "two ends": TWO_ENDS,
}
SENTENCEPIECE = {"zephyr": ZEPHYR, "llama 2": LLAMA_2, "mistral 0.1": MISTRAL_01, "gemma": GEMMA}
ENDS = {
    "gemma": ["<end_of_turn>"],
    "mistral 0.1": ["</s>"],
    "mistral 0.3": ["</s>"],
    "llama 3": ["<|eot_id|>"],
    "qwen 3": ["<|im_end|>"],
    "phi 3": ["<|end|>"],
    "two ends": ["<|return|>", "<|end|>"],
}
NO_SYSTEM, REWRITES = ("gemma", "mistral 0.1"), ("mistral 0.3", "qwen 3", "two ends")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Add 1 and 2."},
    {"role": "assistant", "content": "It is 3, as I said."},
    {"role": "user", "content": "Thanks é 世"},
    {"role": "assistant", "content": "Bye\n\nnow"},
    {"role": "user", "content": "Wait!"},
    {"role": "assistant", "content": "Yes?"},
]


@functools.cache
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(DEMO))


def demo(name: str, *, marked: bool = False) -> Any:
    """The demo tokenizer with the tokens and the template of a form."""
    found = copy.deepcopy(demo_tokenizer())
    found.add_tokens([AddedToken(token, special=True) for token in SPECIAL[name]], special_tokens=True)
    found.add_tokens(["<think>", "</think>"])
    found.bos_token = SPECIAL[name][0]
    found.eos_token = "</s>" if "</s>" in SPECIAL[name] else found.eos_token
    return templated(found, FORMS[name], marked)


def templated(tokenizer: Any, template: str, marked: bool) -> Any:
    tokenizer.chat_template = template if marked else re.sub(r"\{%- (end)?generation -%\}", "", template)
    return tokenizer


def sentencepiece(name: str, *, marked: bool = False) -> Any:
    """A BPE as LlamaTokenizerFast has it: a blank before every text, bytes for what it has no piece for."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABIMNSTWY.,?!<>|[]/123",
        "▁I",
        "IN",
        "IT",
        "▁t",
        "▁th",
        "is",
        "al",
    ]
    vocab = {piece: n for n, piece in enumerate([*pieces, *dict.fromkeys(words)])}
    merges = [("▁", "I"), ("I", "N"), ("▁", "t"), ("▁t", "h"), ("i", "s"), ("a", "l")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    if name == "gemma":
        tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL[name]]
        found.add_tokens(tokens, special_tokens=True)
    return templated(found, SENTENCEPIECE[name], marked)
