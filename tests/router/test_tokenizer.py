"""Tokenizers load without transformers and encode as transformers does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from raytroupe.cluster.errors import CheckpointError
from raytroupe.router.detokenizer import Detokenizer
from raytroupe.router.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "deploy" / "demo_models" / "demo-large"
TEXTS = ["", "What is 3 + 4?", "<|user|>hi<|end|>", "👩‍👩‍👧 世界"]


@pytest.mark.parametrize("extra", [{}, {"add_bos_token": False}, {"add_eos_token": True}, {"unk_token": "What"}])
async def test_tokens_and_texts_equal_those_of_transformers(tmp_path: Path, extra: dict[str, object]) -> None:
    from transformers import AutoTokenizer

    for file in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(DEMO / file, tmp_path)
    config = json.loads((DEMO / "tokenizer_config.json").read_text()) | extra
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special).input_ids
            assert await ours.encode(text, add_special_tokens=special) == expected
        tokens = await ours.encode(text, add_special_tokens=True)
        for skip in (True, False):
            detokenizer = Detokenizer(ours, skip_special_tokens=skip)
            assert "".join(map(detokenizer.push, tokens)) == theirs.decode(tokens, skip_special_tokens=skip)


async def test_the_demo_chat_prompt_equals_that_of_transformers() -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ours = Tokenizer.load(DEMO)
    assert ours.chat_template is not None
    theirs = AutoTokenizer.from_pretrained(DEMO).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.chat_template.render(chat) == theirs


async def test_long_texts_are_encoded_alike() -> None:
    tokenizer = Tokenizer.load(DEMO)
    short = await tokenizer.encode("a 1\n", add_special_tokens=False)
    assert await tokenizer.encode("a 1\n" * 5000, add_special_tokens=False) == short * 5000


async def test_truncation_stored_with_a_tokenizer_is_switched_off(tmp_path: Path) -> None:
    backend = Backend.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(await Tokenizer.load(tmp_path).encode("1 2 3 4 5 6", add_special_tokens=False)) == 11
    assert len(await Tokenizer.load(tmp_path).encode("1", add_special_tokens=False)) == 1


async def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "Ġ": 3}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert await tokenizer.encode("abab a", add_special_tokens=False) == [2, 2, 3, 0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected an object, found list"),
        ("config.json", "{}", "no tokenizer.json"),
    ],
)
def test_an_unreadable_folder_is_refused_by_file(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_ingress_imports_neither_torch_nor_transformers() -> None:
    check = "import sys, raytroupe.router.ingress; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
