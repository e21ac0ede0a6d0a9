"""The graph from a prompt's tokens to its conditions, and the prompts that graphs are fed with to compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from distill_core.artifacts.prompt_reading import PROMPTS
from distill_core.networks.prompts import PromptEncoder
from distillery_converter.calibration import COUNT, Arrays
from distillery_converter.graph import SEED, Graph

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
WORDS = 40  # of a fixed prompt, at most


class TextEncoderGraph(nn.Module):
    """Tokens and masks, in the order of `names`, to the conditions `outputs`."""

    def __init__(self, text: PromptEncoder, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.models = nn.ModuleList(text.models)  # parts of this module, so that their weights are exported
        self.text, self.names, self.outputs = text, tuple(names), tuple(outputs)

    def forward(self, *tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
        cond = self.text.conditions(dict(zip(self.names, tokens, strict=True)))
        answers = tuple(cond[name] for name in self.outputs)
        # An output that is an input, as a mask may be, would take the input's name away.
        answers = tuple(each.clone() if any(each is one for one in tokens) else each for each in answers)
        return answers if len(answers) > 1 else answers[0]


def text_graph(text: PromptEncoder, examples: Sequence[str] = ()) -> Graph:
    """The graph that encodes prompts, for text-to-image models; `examples` are prompts of its kind."""
    names = tuple(name for each in text.reads() for name in each.names)
    outputs = tuple(text.encode([""]))
    lengths = [[each.length for each in text.reads(negative)] for negative in (False, True)]

    def tokens(prompts: list[str], *, negative: bool = False) -> Arrays:
        found = text.tokens(prompts, negative=negative, filled=True)
        return {name: value.cpu().numpy() for name, value in found.items()}

    def served(seed: int) -> list[Arrays]:
        chosen = [examples[(index + seed) % len(examples)] for index in range(COUNT)] if examples else None
        prompts = chosen or fixed_prompts(COUNT, seed=seed)
        return [tokens(prompts), *([tokens(prompts, negative=True)] if text.minds_negative else [])]

    return Graph(
        "text_encoder",
        TextEncoderGraph(text, names, outputs),
        outputs,
        lambda batch: tokens(fixed_prompts(batch)),
        served=served,
        frees=dict.fromkeys(names, (1,)) if lengths[0] != lengths[1] else {},
        beside={PROMPTS: text.reading.model_dump_json(indent=1)},
    )


def fixed_prompts(count: int, *, seed: int = SEED) -> list[str]:
    """Words of random letters, as few or as many as a prompt may have; item i is the same in any number of them."""
    return [_words(np.random.default_rng((seed, index))) for index in range(count)]


def _words(rng: np.random.Generator) -> str:
    lengths = rng.integers(1, 8, size=rng.integers(1, WORDS))
    return " ".join("".join(rng.choice(LETTERS, size=length)) for length in lengths)


def write_tokenizers(folder: Path, text: PromptEncoder) -> None:
    """Write each tokenizer's `tokenizer.json`, the form that is read without transformers, where it is missing."""
    for each in text.reads():
        target = folder / each.tokenizer
        if not (target / "tokenizer.json").is_file():
            text.parts[each.tokenizer].save_pretrained(target)


def encoded(encode: Callable[[list[str]], dict[str, Tensor]], examples: Sequence[str], count: int) -> Arrays:
    """The conditions of `count` prompts: of the examples in turn, or of fixed words."""
    prompts = (
        [examples[index % len(examples)] for index in range(count)] if examples else fixed_prompts(count)
    )
    return {name: value.cpu().numpy() for name, value in encode(prompts).items()}
