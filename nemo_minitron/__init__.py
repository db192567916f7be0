"""Small language models out of large ones: score, prune, distil, align, evaluate and export.

It works on Megatron GPT models while they are sharded, with NeMo around them.
Importing this package is cheap: torch, Megatron-core and NeMo are imported by the modules that need them.
"""

__version__ = "0.1.0"
