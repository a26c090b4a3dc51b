"""A model's tokenizer: text to token ids, token ids to bytes, messages to a prompt.

`tokenizer.json` is read with the `tokenizers` library directly. Importing transformers takes seconds and brings
torch along; it is the fallback for models that have no `tokenizer.json`. `clean_up_tokenization_spaces` of old
configurations is not applied: it would take back spaces that a stream has already sent.
"""

from __future__ import annotations

import asyncio
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..cluster.errors import CheckpointError
from .chat_template import ChatTemplate, find_chat_template
from .token_bytes import TokenBytes

_INLINE_CHARACTERS = 4096
"""Shorter texts are encoded in the event loop: it takes less time than handing them to a thread."""

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes and decodes for one model."""

    def __init__(self, backend: Backend, chat_template: ChatTemplate | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        """None if the model has none."""
        template = chat_template.definition if chat_template is not None else ""
        self.fingerprint = blake2b((backend.to_str() + template).encode(), digest_size=16).hexdigest()
        """Equal for tokenizers that encode texts and conversations alike."""
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        """Tokens that `skip_special_tokens` leaves out of a text."""
        self.token_bytes = TokenBytes(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer and the chat template of a model folder.

        Raises:
            CheckpointError: a file is missing or malformed; the message names it.
        """
        config = _read_json(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = Backend.from_file(str(file))
            except Exception as error:  # the Rust side raises plain Exception
                raise CheckpointError(f"{file}: not a tokenizer: {error}") from None
        else:
            backend = _convert_with_transformers(folder)
        special_tokens = _special_tokens(folder, config)
        # transformers treats these as special even where tokenizer.json does not say so.
        backend.add_special_tokens([t for t in special_tokens.values() if backend.token_to_id(t) is not None])
        source = find_chat_template(folder, config)
        return cls(backend, ChatTemplate(source, special_tokens) if source else None)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. A long text is encoded in a thread, so that other requests go on meanwhile.

        Args:
            text: without surrogates.
            add_special_tokens: put the tokens that the model expects around a text, such as bos.
        """
        if len(text) <= _INLINE_CHARACTERS:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        encoding = await asyncio.to_thread(self._backend.encode, text, add_special_tokens=add_special_tokens)
        return encoding.ids


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(content).__name__}")
    return content


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by the names that chat templates use."""
    declared = {**_read_json(folder / "special_tokens_map.json"), **config}
    found = {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = declared.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _convert_with_transformers(folder: Path) -> Backend:
    """The tokenizer of a folder without `tokenizer.json`, converted from its SentencePiece or BPE files."""
    from transformers import AutoTokenizer  # imports torch: only models without tokenizer.json pay for it

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for an unreadable folder
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: no tokenizer.json, and no other tokenizer could be read: {reason}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise CheckpointError(f"{folder}: {type(tokenizer).__name__} has no tokenizers backend; add a tokenizer.json")
    return backend
