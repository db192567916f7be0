"""An Ollama Modelfile beside a GGUF file (https://github.com/ollama/ollama, docs/modelfile.md).

Ollama reads the chat template and tokenizer out of the file; what is said here is what it does not find there.
"""

from collections.abc import Sequence

NAME = "Modelfile"


def modelfile(file: str, stops: Sequence[str], context: int, licence: str | None) -> str:
    """The text.

    Args:
        file: the name of the GGUF file, in the same directory.
        stops: texts of the tokens that end an answer.
        context: in tokens.
        licence: its title and link.
    """
    lines = [f"# ollama create NAME -f {NAME}", f"FROM ./{file}", f"PARAMETER num_ctx {context}"]
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in dict.fromkeys(stops) if stop.strip()]
    if licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
