"""Small models to merge: a base and models near it, as Hugging Face directories with one tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.merging.methods import METHODS
from nemo_minitron.merging.settings import Merge, number

TOKENIZER = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher"
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def model(seed: int = 7, **sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval()


def family(home: Path, count: int = 2, **sizes: Any) -> list[Path]:
    """A base, then `count` models that differ from it by noise with a part in common, so that signs agree at times."""
    base = model(**sizes)
    generator = torch.Generator().manual_seed(11)
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    shared = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    made = [saved(base, home / "base")]
    for i in range(count):
        noise = {n: torch.randn(weight.shape, generator=generator) for n, weight in weights.items()}
        base.load_state_dict({n: weights[n] + 0.01 * (shared[n] + noise[n]) for n in weights})
        made.append(saved(base, home / f"model{i}"))
    return made


def saved(of: Any, place: Path) -> Path:
    of.save_pretrained(place)
    for file in TOKENIZER.glob("*token*.json"):
        shutil.copy(file, place)
    return place


def weights_of(place: Path) -> dict[str, Any]:
    """float64 numpy arrays by name, by safetensors' own reader."""
    from safetensors.torch import load_file

    return {
        name: tensor.double().numpy()
        for file in sorted(place.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def simple(method: str, **more: Any) -> Merge:
    """A merge of A and B, from the base C where there is one."""
    return Merge(
        **{  # type: ignore[arg-type]
            "method": method,
            "models": ("A", "B"),
            "base": "C" if METHODS[method].base else None,
            "weights": (number(0.5), number(0.25)),
            "densities": (number(0.5), number(0.75)),
            **more,
        }
    )
