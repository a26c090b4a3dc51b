"""One of the models of an evaluation before it is loaded, and which two may be compared."""

from __future__ import annotations

from collections.abc import Sequence

from ...cluster.checkpoint_hash import hash_checkpoint
from ...cluster.errors import ConfigError
from ...cluster.model_spec import ModelSpec, load_spec
from ...router.tokenizer import Tokenizer
from ..model_folder import find_model_folder
from .held_out_text import Sample, ScoredSequence, tokenise
from .items import EvalItem
from .loaded_model import chat_prompts


class Candidate:
    """A model's folder, its tokenizer, and the questions and text as its tokens."""

    def __init__(
        self,
        model: str,
        items: Sequence[EvalItem],
        samples: Sequence[Sample],
        *,
        window: int,
        max_tokens: int,
        kv_cache_dtype: str,
    ) -> None:
        """
        Raises:
            ConfigError: a question or a chat is longer than the model's context.
            CheckpointError: the folder lacks a config or a tokenizer.
        """
        self.folder = find_model_folder(model)
        self.kv_cache_dtype = kv_cache_dtype
        self.spec: ModelSpec = load_spec(self.folder)
        self.tokenizer = Tokenizer.load(self.folder)
        self.prompts = chat_prompts(items, self.tokenizer)
        context = self.spec.max_position_embeddings
        self.sequences: list[ScoredSequence] = tokenise(samples, self.tokenizer, window, context)
        asked = max(map(len, self.prompts)) + max_tokens
        if asked > context:
            raise ConfigError(
                f"the longest question and --max-tokens {max_tokens} make {asked} tokens, and the context of "
                f"{self.folder.name} is {context}; ask for fewer"
            )
        self.longest = max(asked, *(len(sequence.tokens) for sequence in self.sequences))

    def read_content(self) -> None:
        """Hash the files, which takes a while."""
        self.content = hash_checkpoint(self.folder)


def check_comparable(variant: Candidate, base: Candidate) -> None:
    """A comparison means something only if the base is what the variant was made of, and is not a variant itself. Of
    the former all can be asked but where the weights came from: the same shape, vocabulary and formulas.

    Raises:
        ConfigError: the base is quantised, is of another shape, or makes other tokens of the text.
    """
    name, of = variant.folder.name, base.folder.name
    if base.spec.quantisation is not None:
        raise ConfigError(
            f"{of} is quantised itself ({base.spec.quantisation.label}), so nothing that {name} loses against it says "
            "what it has lost in all; name the model --against that it was quantised from"
        )
    for field in base.spec.__struct_fields__:
        ours, theirs = getattr(variant.spec, field), getattr(base.spec, field)
        if field not in ("quantisation", "dtype") and ours != theirs:
            values = f": {ours} and {theirs}" if isinstance(ours, int | float | str) else ""
            raise ConfigError(
                f"{name} was not made of {of}, since they differ in {field}{values}; name the model --against that it "
                "was made of"
            )
    if variant.sequences != base.sequences:
        raise ConfigError(
            f"{name} was not made of {of}: they make different tokens of the same text; name the model --against that "
            "it was made of"
        )


def check_differing(variant: Candidate, base: Candidate) -> None:
    """After `read_content` of both.

    Raises:
        ConfigError: both have the same weights and KV cache, so that the verdict would be a pass whatever they are.
    """
    if variant.content.weights == base.content.weights and variant.kv_cache_dtype == base.kv_cache_dtype:
        raise ConfigError(
            f"{variant.folder} and {base.folder} have the same weights and KV cache, so there is nothing to compare; "
            "name the model --against that MODEL was made of, or the --kv-cache-dtype to judge"
        )
