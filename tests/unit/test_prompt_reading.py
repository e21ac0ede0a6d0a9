"""How an export says that its prompts are read: what is missing, damaged or too large is refused in a sentence."""

from __future__ import annotations

import pytest

from distill_core.artifacts import CondSpec
from distill_core.artifacts.prompt_reading import PROMPTS, PromptReading, TokenInput
from distill_core.errors import ArtifactError
from distillery_sampler.backends.tokens import reading_of

PLAIN = CondSpec(kind="prompt", max_tokens=9, embed_dim=6)


def test_an_export_of_before_the_file_reads_as_many_tokens_as_its_model(tmp_path):
    (tokens,) = reading_of(tmp_path, PLAIN).tokens
    assert (tokens.length, tokens.limit, tokens.names) == (9, 9, ("input_ids",))


@pytest.mark.parametrize("more", [{"masked": True}, {"pooled_dim": 12}])
def test_a_missing_file_is_refused_where_prompts_are_more_than_tokens(tmp_path, more):
    with pytest.raises(
        ArtifactError, match="prompts.json is missing beside the graphs; convert the model again"
    ):
        reading_of(tmp_path, PLAIN.model_copy(update=more))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        PromptReading(tokens=(TokenInput(length=7, limit=7),), negative=(TokenInput(length=7, limit=7),))
        .model_dump_json()
        .replace(":7,", ":2000000000,", 1),
        '{"tokens": [{"tokenizer": "../tokenizer", "length": 7, "limit": 7}], "negative": []}',
    ],
    ids=["cut", "too long", "outside"],
)
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / PROMPTS).write_text(text)
    with pytest.raises(ArtifactError, match="prompts.json cannot be read"):
        reading_of(tmp_path, PLAIN)
