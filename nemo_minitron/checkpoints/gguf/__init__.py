"""GGUF files (llama.cpp's) as sources: each is converted once, into the cache, to a Hugging Face directory.

A file is untrusted: its header is checked against its size (`reader`), its metadata against their ranges (`settings`),
every tensor against the architecture (`weights`), before anything is written.
"""

from nemo_minitron.checkpoints.gguf.directory import is_gguf, to_huggingface

__all__ = ["is_gguf", "to_huggingface"]
