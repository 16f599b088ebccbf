"""``components.data.tokenizer``: special tokens are what the checkpoint says and the caller asks for."""

import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.data import load_tokenizer

BOS, EOS = 0, 1


def configure(folder, **files):
    """Replace the configuration files of a tokenizer directory."""
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_decoding_gives_the_text_back_whatever_special_tokens_were_added(tokenizer_dir, text):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True, add_eos=True)) == text


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_special_tokens_are_exactly_those_asked_for(tokenizer_dir, add_bos, add_eos):
    tokenizer = load_tokenizer(tokenizer_dir)
    plain = tokenizer.encode("ab")
    assert len(plain) == 2  # the post-processor's own BOS is left out
    expected = [BOS] * add_bos + plain + [EOS] * add_eos
    assert tokenizer.encode("ab", add_bos=add_bos, add_eos=add_eos) == expected
    assert tokenizer.encode_batch(["ab", "ab"], add_bos=add_bos, add_eos=add_eos) == [expected] * 2


def test_truncation_and_padding_of_the_checkpoint_are_switched_off(tokenizer_dir):
    path = str(tokenizer_dir / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(path)
    inner.enable_truncation(2)
    inner.enable_padding(length=10)
    inner.save(path)
    assert len(load_tokenizer(tokenizer_dir).encode("abcde")) == 5


def test_the_vocabulary_holds_the_special_tokens(tokenizer_dir):
    assert load_tokenizer(tokenizer_dir).vocab_size == 2 + 256


def test_padding_is_the_eos_token_unless_there_is_a_pad_token(tokenizer_dir):
    assert load_tokenizer(tokenizer_dir).pad_id == EOS
    configure(tokenizer_dir, tokenizer_config={"eos_token": "<eos>", "pad_token": "<bos>"})
    assert load_tokenizer(tokenizer_dir).pad_id == BOS


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        # Qwen2.5: the tokenizer says that there is no BOS, whatever the model's files say.
        (
            {
                "tokenizer_config": {"bos_token": None, "eos_token": "<eos>", "pad_token": "<eos>"},
                "generation_config": {"bos_token_id": 5, "pad_token_id": 5},
                "config": {"bos_token_id": 5},
            },
            (None, EOS, EOS),
        ),
        # Llama 3.2: generation stops at several tokens.
        ({"generation_config": {"bos_token_id": BOS, "eos_token_id": [EOS, 7, 8]}}, (BOS, EOS, EOS)),
        # GPT-2: only the model's own file names them.
        (
            {"tokenizer_config": {"model_max_length": 9}, "config": {"bos_token_id": EOS, "eos_token_id": EOS}},
            (EOS, EOS, EOS),
        ),
    ],
    ids=["qwen2.5", "llama3.2", "gpt2"],
)
def test_the_first_file_that_mentions_a_special_token_decides(tokenizer_dir, files, ids):
    configure(tokenizer_dir, **files)
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


def test_a_bos_that_does_not_exist_cannot_be_added(tokenizer_dir):
    configure(tokenizer_dir, tokenizer_config={"bos_token": None, "eos_token": "<eos>"})
    with pytest.raises(ValueError, match="no BOS token; set add_bos: false"):
        load_tokenizer(tokenizer_dir).encode("a", add_bos=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "<bos>"}, "no EOS token in .* set eos_token in tokenizer_config.json"),
        ({"eos_token": "<end>"}, "eos_token '<end>' of .*tokenizer_config.json is not in tokenizer.json"),
    ],
)
def test_wrong_special_tokens_are_refused(tokenizer_dir, config, message):
    configure(tokenizer_dir, tokenizer_config=config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tokenizer_dir)


def test_missing_and_damaged_files_are_named(tokenizer_dir, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json in checkpoint_dir"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tokenizer_dir / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name} .*download the checkpoint again"):
            load_tokenizer(tokenizer_dir)
