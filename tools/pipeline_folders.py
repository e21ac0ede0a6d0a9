"""Folders of published pipelines as their configs alone: sizes and classes, without any weight.

A tokenizer is a stand-in of letters: a prompt has as many tokens as the model reads, whatever its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "model_configs"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
CLIP_TOKENS = 77


def model_names() -> list[str]:
    """The pipelines whose configs are kept."""
    return sorted(file.stem for file in MODELS.glob("*.json"))


def facts(name: str) -> dict[str, Any]:
    """What is kept of a pipeline: its title, source, and each part's class and config."""
    found: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def write_folder(name: str, folder: Path) -> Path:
    """The folder of pipeline `name`, complete but for its weights."""
    model, index = facts(name), {}
    for part, made in model["parts"].items():
        (folder / part).mkdir(parents=True)
        index[part] = (
            _write_tokenizer(made, folder / part) if isinstance(made, str) else _write(made, folder / part)
        )
    index |= {"_class_name": model["pipeline"], **model["index"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write(part: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """A part's config; its entry in the index."""
    import transformers

    name = str(part["class"])
    model: Any = getattr(transformers, name, None)
    if model is not None:
        config = model.config_class(**part["config"])
        config.architectures = [name]
        config.save_pretrained(folder)
        return "transformers", name
    file = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    (folder / file).write_text(json.dumps({"_class_name": name, **part["config"]}), encoding="utf-8")
    return "diffusers", name


def _write_tokenizer(kind: str, folder: Path) -> tuple[str, str]:
    """A tokenizer that knows letters; its entry in the index."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if kind == "t5":
        special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        words = [*special, *((letter, -3.0) for letter in LETTERS)]
        tokenizer: Any = T5Tokenizer(vocab=words, extra_ids=0)
    else:
        marked = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
        vocab = {word: number for number, word in enumerate(marked)}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)
    tokenizer.save_pretrained(folder)
    return "transformers", type(tokenizer).__name__
