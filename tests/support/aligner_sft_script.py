"""A few steps of SFT with NeMo-Aligner's own model and trainer, as its `train_gpt_sft.py` orders them.

Usage: [torchrun --nproc-per-node TP] aligner_sft_script.py DIRECTORY [--steps N] [--tp TP]
The schedule is that of six steps; `--steps` stops earlier, and the next run in DIRECTORY goes on from there.
Rank 0 prints `losses: [...]` and, last, the path of the .nemo file.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron import cpu_compat

SCHEDULED_STEPS, GLOBAL_BATCH = 6, 4


def write_tokenizer(directory: Path, text: list[str]) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=300, special_tokens=["<s>", "</s>", "<pad>", "<unk>"])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(directory)


def write_data(path: Path) -> list[str]:
    # One answer for all, so that three steps are enough for the loss to fall.
    rows = [{"input": f"Question {i}: what comes?", "output": "always the same answer"} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{row['input']} {row['output']}" for row in rows]


def model_config(inputs: Path, tp: int) -> dict:
    data = {
        "file_path": str(inputs / "sft.jsonl"),
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL_BATCH,
        "max_seq_length": 64,
        "min_seq_length": 1,
        "label_key": "output",
        "truncation_field": "input",
        "prompt_template": "{input} {output}",
        "add_eos": True,
        "memmap_workers": 1,
        "index_mapping_dir": str(inputs),
    }
    return {
        "mcore_gpt": True,
        "seed": 1234,
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL_BATCH,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "encoder_seq_length": 64,
        "max_position_embeddings": 64,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "rmsnorm",
        "bias": False,
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 8,
        "transformer_engine": True,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "apply_rope_fusion": False,
        "get_attention_mask_from_fusion": False,
        "gradient_as_bucket_view": True,
        "answer_only_loss": True,
        "peft": {"peft_scheme": "none", "restore_from_path": None},
        "tokenizer": {"library": "huggingface", "type": str(inputs / "tokenizer"), "use_fast": True},
        "data": {"num_workers": 0, "chat": False, "train_ds": data, "validation_ds": data},
        "optim": {
            "name": "sharded_adamw",
            "lr": 1e-2,
            "weight_decay": 0.01,
            "betas": [0.9, 0.98],
            "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 1e-3},
        },
    }


def config(directory: Path, inputs: Path, steps: int, tp: int) -> dict:
    sft = {"max_epochs": 1, "max_steps": steps, "val_check_interval": steps, "save_interval": steps}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": tp,
            "num_nodes": 1,
            "precision": 32,
            "logger": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "max_epochs": 1,
            "max_steps": SCHEDULED_STEPS,
            "max_time": None,
            "sft": {**sft, "limit_val_batches": 1, "gradient_clip_val": 1.0},
        },
        "exp_manager": {
            "explicit_log_dir": str(directory / "logs"),
            "create_tensorboard_logger": False,
            "create_checkpoint_callback": True,
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "log_tflops_per_sec_per_gpu": False,
            "checkpoint_callback_params": {
                "monitor": "val_loss",
                "save_top_k": 1,
                "mode": "min",
                "save_nemo_on_train_end": True,
                # Aligner reads all three back from the name when it resumes; one that is absent counts as 0.
                "filename": "sft-{step}-{consumed_samples}-{epoch}",
            },
        },
        "model": model_config(inputs, tp),
    }


class Losses:
    """A logger that keeps the training losses."""

    def __init__(self) -> None:
        self.train: list[float] = []

    def log_metrics(self, metrics: dict, step: int | None = None, prefix: str = "") -> None:
        if prefix == "train/":
            self.train.append(metrics["loss"])

    def finalize(self) -> None:
        pass


def loader_of(cfg: DictConfig, model: Any, consumed_samples: int) -> Any:
    from nemo_aligner.data.nlp.builders import build_dataloader, build_sft_dataset

    data = cfg.model.data.train_ds
    dataset = build_sft_dataset(data, model.tokenizer, None, answer_only_loss=True, is_chat=False)
    return build_dataloader(
        cfg=cfg,
        dataset=dataset,
        consumed_samples=consumed_samples,
        mbs=data.micro_batch_size,
        gbs=data.global_batch_size,
        collate_fn=dataset.collate_fn,
    )


def train(cfg: DictConfig) -> list[float]:
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils import train_script_utils as aligner
    from nemo_aligner.utils.distributed import Timer

    from nemo_minitron.cpu_compat.aligner import connect_ranks

    trainer = aligner.resolve_and_create_trainer(cfg, "sft")
    exp_manager(trainer, cfg.exp_manager)
    connect_ranks(trainer, cfg.model)
    model = GPTSFTModel(cfg.model, trainer)
    aligner.init_peft(model, cfg.model)
    aligner.init_distributed(trainer, model, use_te=False)
    done = aligner.retrieve_custom_trainer_state_dict(trainer)
    loader = loader_of(cfg, model, done["consumed_samples"] if done else 0)
    aligner.init_using_ptl(trainer, model, loader, loader.dataset)
    optimizer, scheduler = aligner.extract_optimizer_scheduler_from_ptl_model(model)
    losses = Losses()
    supervised = SupervisedTrainer(
        cfg=cfg.trainer.sft,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader,
        val_dataloader=loader_of(cfg, model, 0),
        test_dataloader=None,
        logger=losses,
        ckpt_callback=aligner.add_custom_checkpoint_callback(trainer, model),
        run_timer=Timer(None),
    )
    if done:
        supervised.load_state_dict(done)
    supervised.fit()
    return losses.train


def main(directory: Path, steps: int, tp: int) -> None:
    inputs = directory / "inputs"
    # The other ranks read these files only after `connect_ranks`, where they meet rank 0.
    if os.environ.get("RANK", "0") == "0" and not inputs.exists():
        inputs.mkdir(parents=True)
        write_tokenizer(inputs / "tokenizer", write_data(inputs / "sft.jsonl"))
    cpu_compat.prepare_aligner()
    losses = train(OmegaConf.create(config(directory, inputs, steps, tp)))
    if os.environ.get("RANK", "0") == "0":
        print("losses:", json.dumps(losses))
        print(*directory.rglob("*.nemo"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    main(args.directory, args.steps, args.tp)
