"""The model card: README.md of what is exported, by huggingface_hub's ModelCard."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_minitron.arch import Architecture
from nemo_minitron.errors import InputError
from nemo_minitron.export import consumers, licences
from nemo_minitron.export.licences import NONE, Licence
from nemo_minitron.export.lineage import Lineage, Step

FILE = "README.md"
PICTURE = "importance.png"
_TAGS = ("nemo-minitron", "pruned", "distilled")
_MERGED_TAGS = ("nemo-minitron", "merge")
_METHODS = {
    "pretrain": "trained from scratch",
    "prune": "pruned by importance ([arXiv 2407.14679](https://arxiv.org/abs/2407.14679))",
    "search": "the best of a search of pruned candidates",
    "distill": "distilled from its teacher ([arXiv 2408.11796](https://arxiv.org/abs/2408.11796))",
    "correct_teacher": "trained on next tokens",
    "sft": "fine-tuned on instructions",
    "preference": "aligned with preferences",
    "merge": "merged with models of its architecture",
}
_SIZES = (
    ("num_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("ffn_hidden_size", "MLP size"),
    ("num_attention_heads", "attention heads"),
    ("num_query_groups", "query groups"),
    ("kv_channels", "head dimension"),
    ("vocab_size", "vocabulary"),
)
_LOSSES = (
    ("lm_loss_nats_before", "held-out LM loss before, nats a token"),
    ("lm_loss_nats_after", "held-out LM loss after, nats a token"),
    ("lm_loss_nats_teacher", "of the teacher"),
    ("valid_loss_nats_after", "validation loss after, nats a token"),
    ("task_accuracy_after", "task accuracy after"),
)
# Directories of the machine that made it are nobody's business.
_DIRECTORY = re.compile(r"(?<![\w.:/])(?:~|/)(?:[^\s'\",:=/]+/)+")


@dataclass(frozen=True)
class MergeFacts:
    """What a merged model was made of.

    Attributes:
        method: its name.
        models: by which the card calls them, the base first.
        recipe: the merge as YAML.
        note: lines of Markdown on how the recipe was found; "" where a user gave it.
    """

    method: str
    models: tuple[str, ...]
    recipe: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        name: of the model.
        lineage: where it comes from.
        licence: None for a model of one's own.
        architecture: its sizes.
        result: of the export: `result.json`'s fields.
        repository: ORG/NAME where it will lie, or None.
        file: of a GGUF export, its name; None for a Hugging Face directory.
        has_template: whether it has a chat template.
        picture: whether `PICTURE` lies beside the card.
        merge: of a model that was merged.
    """

    name: str
    lineage: Lineage
    licence: Licence | None
    architecture: Architecture
    result: Mapping[str, Any]
    repository: str | None
    file: str | None
    has_template: bool
    picture: bool
    merge: MergeFacts | None = None


def card(facts: Facts) -> str:
    """The text of README.md, checked.

    Raises:
        InputError: metadata that the hub would refuse.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="gguf" if facts.file else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *(_MERGED_TAGS if facts.merge else _TAGS),
            *(["conversational"] if facts.has_template else []),
        ],
        base_model=_base_models(facts),
        **_licence_fields(facts.licence),  # type: ignore[arg-type]
    )
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(facts)) + "\n"))
    check(text)
    return text


def check(text: str) -> None:
    """What the hub's validation asks of a card's metadata, without the hub.

    Source: https://huggingface.co/docs/hub/model-cards, and `huggingface_hub.repocard_data`@0.36.

    Raises:
        InputError: which field is wrong.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        data = ModelCard(text).data.to_dict()
    except ValueError as error:
        raise InputError(f"{FILE}: {' '.join(str(error).split())[:200]}") from None
    if data.get("license") == "other" and not data.get("license_name"):
        raise InputError(f"{FILE}: license: other needs a license_name")
    for name in ("license_name",):
        if (value := data.get(name)) is not None and not re.fullmatch(r"[a-z0-9.-]+", value):
            raise InputError(f"{FILE}: {name}: {value}: must be lower case letters, digits, - and .")
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(base)
        except HFValidationError:
            raise InputError(f"{FILE}: base_model: {base}: must be ORG/NAME") from None
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise InputError(f"{FILE}: tags: must be a list of texts")


def _base_models(facts: Facts) -> Any:
    """The hub's models that it was made of."""
    if facts.merge is None:
        return _hub_name(facts.lineage.base_name)
    return [name for name in dict.fromkeys(facts.merge.models) if _hub_name(name)] or None


def _hub_name(name: str | None) -> str | None:
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _licence_fields(licence: Licence | None) -> dict[str, str]:
    if licence is None:
        return {}
    if licence.listed:
        return {"license": licence.name}
    return {"license": "other", "license_name": licence.name, "license_link": str(licence.link)}


def _body(f: Facts) -> Iterator[str]:
    yield f"# {f.name}"
    yield ""
    if f.licence and f.licence.built_with:
        yield f"**{f.licence.built_with}**"
        yield ""
    yield from _method(f)
    yield from _sizes(f)
    yield from _merge(f)
    yield from _measured(f)
    yield from _use(f)
    yield from _opens(f)
    yield from _licence_text(f)
    yield from _commands(f.lineage.steps)


def _method(f: Facts) -> Iterator[str]:
    if f.merge is not None:
        models = ", ".join(f.merge.models)
        yield f"Merged of {models} by {f.merge.method}, with nemo_minitron (NVIDIA NeMo and Megatron-core)."
        yield ""
        return
    base = f.lineage.base_name or (f.lineage.base.name if f.lineage.base else None)
    made = [
        _METHODS[s.result["recipe"]] for s in reversed(f.lineage.steps) if s.result.get("recipe") in _METHODS
    ]
    of = f"Made of {base}: " if base else ""
    yield f"{of}{', then '.join(made) or 'exported as it is'}, with nemo_minitron (NVIDIA NeMo and Megatron-core)."
    yield ""


def _sizes(f: Facts) -> Iterator[str]:
    pruned = next((s.result for s in f.lineage.steps if s.result.get("recipe") == "prune"), {})
    a, rows = f.architecture, []
    for name, label in _SIZES:
        rows.append((label, f"{getattr(a, name):,}"))
    rows.append(("parameters", f"{a.parameters():,}"))
    yield from _table(("", f.name), rows)
    if pruned.get("params_before"):
        yield f"The source had {pruned['params_before']:,} parameters."
        yield ""
    if f.picture:
        yield f"![Importance of every unit of the source; the dashed line is where the kept ones end]({PICTURE})"
        yield ""


def _merge(f: Facts) -> Iterator[str]:
    if f.merge is None:
        return
    yield "## Recipe of the merge"
    yield ""
    yield from filter(None, [f.merge.note])
    yield from _block("yaml", without_directories(f.merge.recipe.rstrip()))


def _measured(f: Facts) -> Iterator[str]:
    rows = []
    for step in reversed(f.lineage.steps):
        recipe, result = str(step.result.get("recipe")), step.result
        rows += (
            [(recipe, "tokens trained on", f"{result['tokens']:,}")] if recipe in _trained_on(result) else []
        )
        rows += [
            (recipe, label, f"{result[key]:.4f}") for key, label in _LOSSES if _is_number(result.get(key))
        ]
    for key, label in (
        ("perplexity", f"perplexity, {f.result.get('quantization')}"),
        ("perplexity_f16", "F16"),
    ):
        if _is_number(f.result.get(key)):
            rows.append(
                (
                    "export",
                    f"{label} ({f.result['perplexity_tokens']} tokens, llama.cpp)",
                    f"{f.result[key]:.4f}",
                )
            )
    if _is_number(f.result.get("verify_max_difference")):
        largest = f"{f.result['verify_largest_logit']:.3g}"
        label = f"largest difference of a logit to the Megatron model (largest logit {largest})"
        rows.append(("export", label, f"{f.result['verify_max_difference']:.2g}"))
    if rows:
        yield "## Measured"
        yield ""
        yield from _table(("step", "what", "value"), rows)
    if count := f.result.get("rows_that_fit_no_block"):
        yield (
            f"{count} matrices have rows that the blocks of {f.result['quantization']} do not divide, and are of "
            f"another type: {', '.join(f.result['rows_that_fit_no_block_first'])}, ..."
        )
        yield ""


def _trained_on(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(result.get("recipe")),) if isinstance(result.get("tokens"), int) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _use(f: Facts) -> Iterator[str]:
    where = f.repository or "DIRECTORY"
    yield "## Use"
    yield ""
    if f.file:
        yield from _block(
            "", f"llama-cli -m {f.file} -p 'Hello'", "ollama create NAME -f Modelfile && ollama run NAME"
        )
        return
    ask = (
        'text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, '
        "add_generation_prompt=True)"
        if f.has_template
        else 'text = "Hello"'
    )
    yield from _block(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{where}", torch_dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        ask,
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))",
    )
    yield from _block(
        "", f"vllm serve {where}", f"python recipes/export.py source={where} format=gguf   # for llama.cpp"
    )


def _opens(f: Facts) -> Iterator[str]:
    if refused := consumers.refusals(f.architecture):
        yield "### Programs that do not open it"
        yield ""
        yield from (f"- {line}" for line in refused)
        yield ""


def _licence_text(f: Facts) -> Iterator[str]:
    if f.licence is None:
        return
    link = f" ({f.licence.link})" if f.licence.link else ""
    yield "## Licence"
    yield ""
    yield f"{f.licence.title}{link}, that of the base model."
    for line in (f.licence.notice, f.licence.built_with):
        if line:
            yield f"\n{line}"
    yield ""


def _commands(steps: Sequence[Step]) -> Iterator[str]:
    commands = [without_directories(s.command) for s in reversed(steps) if s.command]
    if commands:
        yield "## Made with"
        yield ""
        yield from _block("", *commands)
    for step in reversed(steps):
        if step.configuration:
            yield f"<details><summary>Configuration of {step.result.get('recipe')}</summary>"
            yield ""
            yield from _block("yaml", without_directories(step.configuration.rstrip()))
            yield "</details>"
            yield ""


def without_directories(text: str) -> str:
    """A text with only the last part of absolute paths."""
    return _DIRECTORY.sub("", text)


def _block(language: str, *lines: str) -> Iterator[str]:
    yield from (f"```{language}", *lines, "```", "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def licence_of(said: str | None, lineage: Lineage) -> Licence | None:
    """The licence of a model: the user's word, or its base model's own.

    Raises:
        InputError: it is not known, or forbids derivatives.
    """
    if said is not None:
        return None if said.strip().lower() == NONE else licences.of_name(said, f"license={said}")
    if lineage.base is None:
        return None
    if lineage.licence is None:
        raise InputError(
            f"license: nothing in {lineage.base} says what it is under; say license=NAME, such as apache-2.0, or "
            f"license={NONE} if it is your own"
        )
    return licences.of_name(lineage.licence, f"license={lineage.licence}, by {lineage.base}")
