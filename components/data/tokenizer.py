"""Text to token ids and back, with the tokenizer of a Hugging Face checkpoint.

torchtune's model tokenizers can be named in YAML instead. Its ``HuggingFaceBaseTokenizer`` refuses checkpoints without
a BOS token (Qwen2.5 has none), which is why there is one here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from components.data.chat import ChatTemplate


class Tokenizer(Protocol):
    """What is asked of a tokenizer; torchtune's model tokenizers have it too."""

    pad_id: int

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_bos: bool = ..., add_eos: bool = ...) -> list[int]: ...

    def decode(self, token_ids: list[int], /) -> str: ...


class HFTokenizer:
    """A ``tokenizers.Tokenizer`` that knows which ids are special.

    Args:
        tokenizer: what splits text. It is changed never to truncate or pad, which some checkpoints ask for: every
            document would be cut.
        bos_id: begins a text; None where the model has no such token.
        eos_id: ends a text.
        pad_id: fills rows; the EOS token by default.
        chat_template: renders chats; None where the checkpoint has none.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_id: int,
        pad_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included. A model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of ``text``: its special tokens as their ids, and around it exactly those asked for.

        Raises:
            ValueError: ``add_bos``, and there is no BOS token.
        """
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool = False, add_eos: bool = False) -> list[list[int]]:
        """:meth:`encode` of many texts, on all cores."""
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos is true but this tokenizer has no BOS token; set add_bos: false")
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos else []
        # Without add_special_tokens the checkpoint's post-processor would put its own BOS before ours.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [bos + each.ids + eos for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens."""
        return self._tokenizer.decode(list(ids))


def load_tokenizer(checkpoint_dir: str | Path) -> HFTokenizer:
    """The tokenizer of a Hugging Face directory.

    Special tokens are looked up in ``tokenizer_config.json``, ``generation_config.json`` and ``config.json``; the first
    that mentions one decides, also if it says that there is none. The chat template is that of ``chat_template.jinja``, or
    else ``chat_template`` in ``tokenizer_config.json`` (of several, the one named default).

    Args:
        checkpoint_dir: holds ``tokenizer.json`` and at least one of the three.

    Raises:
        ValueError: a file is missing or damaged, a special token is not in the vocabulary, there is no EOS token, or the
            chat template is not one.
    """
    folder = Path(checkpoint_dir)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"no tokenizer.json in checkpoint_dir '{checkpoint_dir}'; it should be a Hugging Face model directory, and "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the file if a model lacks it"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read ({error}); download the checkpoint again") from error
    configs = [folder / name for name in ("tokenizer_config.json", "generation_config.json", "config.json")]
    bos_id, eos_id, pad_id = (_special_id(role, configs, tokenizer) for role in ("bos", "eos", "pad"))
    if eos_id is None:
        raise ValueError(f"no EOS token in '{checkpoint_dir}'; set eos_token in tokenizer_config.json")
    template = _chat_template(folder, tokenizer)
    return HFTokenizer(tokenizer, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, chat_template=template)


def _chat_template(folder: Path, tokenizer: tokenizers.Tokenizer) -> ChatTemplate | None:
    path = folder / "tokenizer_config.json"
    config = _read(path) if path.is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        source = own_file.read_text(encoding="utf-8")
    if source is None:
        return None
    variables = {
        role: token["content"] if isinstance(token, dict) else token
        for role, token in config.items()
        if role.endswith("_token") and isinstance(token, str | dict)
    }
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return ChatTemplate(source, variables=variables, special_tokens=special)


def _special_id(role: str, configs: list[Path], tokenizer: tokenizers.Tokenizer) -> int | None:
    for path in configs:
        config = _read(path) if path.is_file() else {}
        if f"{role}_token" in config:
            token = config[f"{role}_token"]
            text = token["content"] if isinstance(token, dict) else token
            token_id = None if text is None else tokenizer.token_to_id(text)
            if text is not None and token_id is None:
                raise ValueError(f"{role}_token {text!r} of {path} is not in tokenizer.json; correct one of the two")
            return token_id
        if f"{role}_token_id" in config:
            ids = config[f"{role}_token_id"]
            return ids[0] if isinstance(ids, list) else ids  # of several EOS tokens, the first ends a text
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
