"""Three steps of SFT with NeMo-Aligner's own model and trainer, as its `train_gpt_sft.py` orders them.

Usage: python tests/functional/aligner_sft_script.py DIRECTORY
Prints `losses: [...]` and, last, the path of the .nemo file.
"""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemo_minitron import hosts

STEPS, GLOBAL_BATCH = 3, 4


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


def model_config(directory: Path) -> dict:
    data = {
        "file_path": str(directory / "sft.jsonl"),
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL_BATCH,
        "max_seq_length": 64,
        "min_seq_length": 1,
        "label_key": "output",
        "truncation_field": "input",
        "prompt_template": "{input} {output}",
        "add_eos": True,
        "memmap_workers": 1,
        "index_mapping_dir": str(directory),
    }
    return {
        "mcore_gpt": True,
        "seed": 1234,
        "micro_batch_size": 2,
        "global_batch_size": GLOBAL_BATCH,
        "tensor_model_parallel_size": 1,
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
        "tokenizer": {"library": "huggingface", "type": str(directory / "tokenizer"), "use_fast": True},
        "data": {"num_workers": 0, "chat": False, "train_ds": data, "validation_ds": data},
        "optim": {
            "name": "sharded_adamw",
            "lr": 1e-2,
            "weight_decay": 0.01,
            "betas": [0.9, 0.98],
            "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 1e-3},
        },
    }


def config(directory: Path) -> dict:
    sft = {"max_epochs": 1, "max_steps": STEPS, "val_check_interval": STEPS, "save_interval": STEPS}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 1,
            "precision": 32,
            "logger": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "max_epochs": 1,
            "max_steps": STEPS,
            "max_time": None,
            "sft": {**sft, "limit_val_batches": 1, "gradient_clip_val": 1.0},
        },
        "exp_manager": {
            "explicit_log_dir": str(directory / "logs"),
            "create_tensorboard_logger": False,
            "create_checkpoint_callback": True,
            "log_tflops_per_sec_per_gpu": False,
            "checkpoint_callback_params": {
                "monitor": "val_loss",
                "save_top_k": 1,
                "mode": "min",
                "save_nemo_on_train_end": True,
                "filename": "sft-{step}",
            },
        },
        "model": model_config(directory),
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


def train(directory: Path) -> list[float]:
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.data.nlp.builders import build_dataloader, build_sft_dataset
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils import train_script_utils as aligner
    from nemo_aligner.utils.distributed import Timer

    from nemo_minitron.hosts.aligner import connect_ranks

    cfg = OmegaConf.create(config(directory))
    trainer = aligner.resolve_and_create_trainer(cfg, "sft")
    exp_manager(trainer, cfg.exp_manager)
    connect_ranks(trainer, cfg.model)
    model = GPTSFTModel(cfg.model, trainer)
    aligner.init_peft(model, cfg.model)
    aligner.init_distributed(trainer, model, use_te=False)

    data_cfg = cfg.model.data.train_ds
    dataset = build_sft_dataset(data_cfg, model.tokenizer, None, answer_only_loss=True, is_chat=False)
    loader = build_dataloader(
        cfg=cfg, dataset=dataset, consumed_samples=0, mbs=2, gbs=GLOBAL_BATCH, collate_fn=dataset.collate_fn
    )
    aligner.init_using_ptl(trainer, model, loader, dataset)
    optimizer, scheduler = aligner.extract_optimizer_scheduler_from_ptl_model(model)
    losses = Losses()
    SupervisedTrainer(
        cfg=cfg.trainer.sft,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=None,
        logger=losses,
        ckpt_callback=aligner.add_custom_checkpoint_callback(trainer, model),
        run_timer=Timer(None),
    ).fit()
    return losses.train


def main(directory: Path) -> None:
    text = write_data(directory / "sft.jsonl")
    write_tokenizer(directory / "tokenizer", text)
    hosts.prepare_aligner()
    losses = train(directory)
    print("losses:", json.dumps(losses))
    print(*directory.rglob("*.nemo"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
