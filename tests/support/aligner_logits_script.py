"""NeMo 2 directories through NeMo-Aligner's GPTSFTModel: what it makes of fixed tokens, and saved again.

Usage: [torchrun --nproc-per-node TP] aligner_logits_script.py TP TOKENS OUTPUT CHECKPOINT...
TOKENS is a safetensors file with `tokens` [n, s]. OUTPUT/I gets `logits.safetensors` with `logits` [n, s, v] in fp32
and `checkpoint`, a NeMo 2 directory, for the I-th CHECKPOINT.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nemo_minitron.alignment import runs, training
from nemo_minitron.alignment.checkpoints import save_model
from nemo_minitron.checkpoints.source import Source, find_source
from nemo_minitron.config.align import AlignConfig
from nemo_minitron.config.trainer import TrainerConfig
from nemo_minitron.environment import rank
from nemo_minitron.workflows.sft import run as sft


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.triu(torch.ones(1, 1, length, length), diagonal=1).bool()
    with torch.no_grad():
        return gather_from_tensor_model_parallel_region(model(tokens, positions, mask))


def through_aligner(source: Source, tp: int, tokens: torch.Tensor, output: Path) -> None:
    cfg = runs.aligner_config(
        source,
        TrainerConfig(tensor_model_parallel_size=tp, max_steps=1, val_check_interval=1, limit_val_batches=1),
        AlignConfig(),
        key="sft",
        directory=output,
        tokenizer=str(source.tokenizer),
        seq_length=source.seq_length,
        max_epochs=1,
        seed=1,
        cuda=False,
        fused=False,
        data={},
    )
    _, model = training.open_model(cfg, "sft", sft.model_class, source)
    logits = logits_of(model.model.eval(), tokens)
    save_model(model, source, output / "checkpoint", tokenizer=source.tokenizer)
    if rank() == 0:
        save_file({"logits": logits.float().contiguous()}, output / "logits.safetensors")


def main(tp: str, tokens: str, output: str, *checkpoints: str) -> None:
    for number, checkpoint in enumerate(checkpoints):
        through_aligner(
            find_source(checkpoint), int(tp), load_file(tokens)["tokens"], Path(output) / str(number)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
