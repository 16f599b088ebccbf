"""docs/data.md: every snippet is a config that the recipe would accept, and those of local files give rows."""

import json
import re
from itertools import islice
from pathlib import Path

import datasets
import pytest
from omegaconf import OmegaConf

from components.data import ChatTemplate, HFTokenizer, load_tokenizer
from components.training import instantiate, validate_config

SNIPPETS = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.DOTALL)
CHAT = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
RECORDS = [
    {
        "prompt": f"p{number}",
        "completion": "c",
        "language": "German",
        "sentence": "ja",
        "english": "yes",
        "code": "x = 1\n" * 200,
        "group": number % 20,
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    for number in range(60)
]


@pytest.fixture
def tokenizer(tokenizer_dir):
    template = ChatTemplate(CHAT, variables={}, special_tokens=["<eos>"])
    plain = load_tokenizer(tokenizer_dir)
    return HFTokenizer(plain._tokenizer, bos_id=None, eos_id=1, chat_template=template)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_gives_rows(number, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for path in ("my_records/train", "my_records/grouped", "my_chats", "my_shards/a", "my_held_out/a"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(f"{path}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    Path("my_texts").mkdir()
    Path("my_texts/a.py").write_text("x = 1\n" * 200)

    cfg = OmegaConf.create(SNIPPETS[number])
    validate_config(cfg)
    if "never run here" in SNIPPETS[number]:
        return
    nodes = {"dataset": cfg.dataset}
    if "validation" in cfg:
        nodes["validation.dataset"] = cfg.validation.dataset
    for path, node in nodes.items():
        rows = instantiate(node, path=path, tokenizer=tokenizer)
        [row] = islice(rows, 1)
        assert row["tokens"].shape == (node.seq_len,)
        assert row["target_mask"].any()
        assert rows.fingerprint


def test_there_are_snippets():
    assert len(SNIPPETS) == 6
