"""The library of configs: every one is a run that starts once model and data are here, and its header says how."""

import functools
import io
import itertools
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import tokenizers
from omegaconf import OmegaConf
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers

from components.cli import known_configs
from components.estimate import GIB
from components.models import known_config, write_stand_in
from components.preview import estimate, memory_of, preview, show
from components.rewards import VerifierReward
from components.training import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = known_configs()
LARGE = ["llama3_1_8b", "llama3_2_3b", "mistral_7b", "qwen2_5_3b", "qwen2_5_7b"]
SMALL = ["llama3_2_1b", "qwen2_5_0_5b", "qwen2_5_1_5b", "smollm2_135m", "smollm2_1_7b", "smollm2_360m"]
RUNS = ["coding_ebft", "coding_sft", "coding_rlvr", "code_ebft", "code_sft"]
RUNS += ["translation_ebft", "translation_sft", "translation_rlvr"]
LIBRARY = {
    f"{model}/{run}{weights}": model
    for models, adapters in ((SMALL, "_lora"), (LARGE, "_qlora"))
    for model, run, weights in itertools.product(models, RUNS, ("", adapters))
}

# As the configs expect them: the paper's sets of the hub, and what `make corpora` writes.
HUB = {"question": "Write f.\n" * 8, "answer": "def f(x):\n    return x\n" * 8}
TESTS = [{"expression": "f(2)", "expected": "2"}]
LOCAL = {"prompt": "Write f.", "completion": "def f(x):\n    return x\n" * 3, "tests": TESTS, "text": "x = 1\n" * 200}
DATA = {
    "sjelassi/opencode-instruct_100k_200tok": HUB,
    "sjelassi/swallow_code_20m": HUB,
    "sjelassi/alma": HUB,
    "sjelassi/wmt22_test": HUB,
    "data/coding": LOCAL,
    "data/stdlib": LOCAL,
    "data/translation": LOCAL,
}
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "</s>"]


@functools.cache
def config(name):
    """Read once, as these are many."""
    return load_config(CONFIGS[name])


def byte_tokenizer(folder):
    """A token for each byte, and those that end the texts of the library's models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0]}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")


def commands(path, start):
    """The command lines in the comment that a config opens with, as lists of words."""
    comment = "".join(
        line.removeprefix("#") for line in itertools.takewhile(lambda line: line.startswith("#"), path.open())
    )
    lines = comment.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith(start)]


def test_the_library_is_complete():
    assert {name for name in CONFIGS if re.search(r"_(ebft|sft|rlvr)(_q?lora)?$", name)} == set(LIBRARY)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data of the names and columns that the configs expect, and with no weights."""
    folder = tmp_path_factory.mktemp("library")
    for path, record in DATA.items():
        (folder / path).mkdir(parents=True)
        for part in ("train", "validation", "test"):
            (folder / path / f"{part}.jsonl").write_text(f"{json.dumps(record)}\n" * 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.mark.parametrize("model", [*LARGE, *SMALL])
def test_every_config_is_valid_on_the_meta_device(model, here):
    """As ``ebft validate`` and ``ebft estimate`` find it, with data and a tokenizer at hand."""
    isolated = shutil.which("bwrap") is not None or "CI" in os.environ
    for name in [name for name in LIBRARY if LIBRARY[name] == model]:
        if "coding_rlvr" in name and not isolated:
            continue
        cfg = config(name)
        checkpoint = Path(cfg.model.checkpoint_dir)
        if not checkpoint.exists():
            write_stand_in(checkpoint, known_config(checkpoint))
            byte_tokenizer(checkpoint)
        with preview(cfg) as found:
            Console(file=io.StringIO()).print(show(found), estimate(found, ranks=8))
            assert not found.missing
            assert found.batch.tokens.shape == (cfg.batch_size, cfg.dataset.seq_len)
            reward = found.parts.training.reward
            assert isinstance(reward, VerifierReward) == ("rlvr" in name)
            if isinstance(reward, VerifierReward):
                [record] = found.batch.records[:1]
                answer = record.get("completion") or record["answer"]
                assert reward.verifier([answer], [record]) == [pytest.approx(1.0)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_header_names_its_own_file_and_a_recipe(name):
    for words in commands(CONFIGS[name], "tune run"):
        assert words[words.index("--config") + 1] == f"configs/{name}.yaml"
        (recipe,) = (word for word in words if word.startswith("recipes/"))
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("name", LIBRARY)
def test_every_command_of_a_header_makes_steps_of_16_rows(name):
    runs = commands(CONFIGS[name], "tune run")
    assert len(runs) == 2
    for words in runs:
        overrides = dict(word.split("=") for word in words[words.index("--config") + 2 :])
        assert overrides.keys() <= {"batch_size", "gradient_accumulation_steps", "cpu_offload"}
        batch_size, accumulation = (
            int(overrides.get(key, config(name)[key])) for key in ("batch_size", "gradient_accumulation_steps")
        )
        assert batch_size * accumulation * int(words[words.index("--nproc_per_node") + 1]) == 16
    assert config(name).output_dir == f"outputs/{name}"


@pytest.mark.parametrize("name", LIBRARY)
def test_a_header_gets_the_model_to_where_the_config_reads_it(name):
    cfg = config(name)
    if name.startswith("smollm2_135m/"):
        assert commands(CONFIGS[name], "make quickstart")
        assert f"CHECKPOINT := {cfg.model.checkpoint_dir}\n" in (ROOT / "Makefile").read_text()
        return
    [[*_, repository, _, folder]] = [words[:5] for words in commands(CONFIGS[name], "tune download")]
    assert folder == cfg.model.checkpoint_dir
    assert Path(folder).name == Path(repository).name


PUBLISHED = {  # by the authors, in qa_code.yaml and the defaults of train_ebft_ray.py
    "seed": 43,
    "epochs": 2,
    "dataset.source.path": "sjelassi/opencode-instruct_100k_200tok",
    "dataset.seq_len": 1024,
    "generator.num_samples": 4,
    "generator.temperature": 0.6,
    "generator.rollout_len": 8,
    "generator.anchors.stride": 8,
    "generator.anchors.context_len": 8,
    "feature_extractor.pooling": "last_token",
    "reward.alignment_coef": 1.0,
    "reward.diversity_coef": 1.0,
    "loss.rl_coef": 1.0,
    "loss.ce_coef": 0.0,
    "optimizer.lr": 1e-6,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.weight_decay": 0.0,
    "lr_scheduler.warmup": 0.03,
    "lr_scheduler.decay": "constant",
    "clip_grad_norm": 1.0,
    "validation.every_n_steps": 100,
    "validation.dataset.max_rows": 128,
}
OF_TRANSLATION = {
    "dataset.source.path": "sjelassi/alma",
    "validation.dataset.source.path": "sjelassi/wmt22_test",
    "generator.rollout_len": 4,
    "generator.anchors.stride": 2,
    "generator.anchors.context_len": 4,
    "feature_extractor.pooling": "mean",
}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2_5_1_5b/coding_ebft", PUBLISHED),
        ("qwen2_5_1_5b/code_ebft", PUBLISHED | {"dataset.source.path": "sjelassi/swallow_code_20m"}),
        ("llama3_2_1b/translation_ebft", PUBLISHED | OF_TRANSLATION),
    ],
)
def test_the_papers_runs_have_the_published_settings(name, published):
    cfg = config(name)
    assert {key: OmegaConf.select(cfg, key) for key in published} == published


@pytest.mark.parametrize("name", LIBRARY)
def test_all_methods_of_a_task_are_validated_alike(name):
    ebft = re.sub(r"_(ebft|sft|rlvr)", "_ebft", name)
    assert config(name).validation == config(ebft).validation


CHOOSING = re.findall(
    r"^\| `(\w+/\w+)` \| (\d.*) \| (\d.*) \|$", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE
)


def peak(name, ranks):
    """As ``configs/README.md`` has it: the peak of a process by the header's command, and what waits in CPU memory."""
    path = CONFIGS[name]
    (command,) = [words for words in commands(path, "tune run") if words[3] == str(ranks)]
    with preview(load_config(path, [word for word in command[7:] if "=" in word])) as found:
        memory = memory_of(found, ranks=ranks)
    offloaded = sum(memory.offloaded.values())
    return f"{memory.peak / GIB:.0f}" + (f" + {offloaded / GIB:.0f} CPU" if offloaded else "")


@pytest.mark.parametrize("row", CHOOSING, ids=lambda row: row[0])
def test_the_table_to_choose_by_is_what_is_estimated_now(row):
    name, *cells = row
    assert cells == [peak(name, 1), peak(name, 8)]
