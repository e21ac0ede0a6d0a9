"""How prompts become the inputs of an exported text graph: written beside it, read where there is no transformers."""

from __future__ import annotations

from pydantic import Field

from distill_core.config import Config

PROMPTS = "prompts.json"  # beside the graphs
MAX_TOKENS = 2**16


class TokenInput(Config):
    """Tokens of a prompt by one tokenizer: `input_ids` int64 (B, length), filled up behind and cut."""

    tokenizer: str = Field("tokenizer", pattern="^tokenizer(_[2-9])?$")  # sub-folder of the model
    length: int = Field(ge=1, le=MAX_TOKENS)
    limit: int = Field(ge=1, le=MAX_TOKENS)  # tokens of the bare prompt that are read
    masked: bool = False  # whether the graph is told which tokens are the prompt's, as `attention_mask`
    before: str = ""  # words around the prompt
    after: str = ""
    tidied: bool = False  # whether the prompt is read in lower case, without blanks around it
    filled: bool = (
        True  # False: what fills up changes nothing, so that a single prompt may be left as long as it is
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The graph's inputs: tokens, and where they are masked the mask int64 (B, length)."""
        end = self.tokenizer.removeprefix("tokenizer")
        return (f"input_ids{end}", *((f"attention_mask{end}",) if self.masked else ()))

    def worded(self, prompt: str) -> str:
        """The text that is tokenized."""
        return self.before + (prompt.lower().strip() if self.tidied else prompt) + self.after


class PromptReading(Config):
    """All inputs of a text graph; its outputs are the conditions by name."""

    tokens: tuple[TokenInput, ...] = Field(min_length=1)
    negative: tuple[TokenInput, ...] = Field(min_length=1)  # of prompts that guidance leads away from
    zero_null: bool = False  # whether zeros mean "no prompt", and not the empty prompt
