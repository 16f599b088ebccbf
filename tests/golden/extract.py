"""Copies what the tests need of the reference tensors, which are larger than a repository should hold.

    python tests/golden/extract.py REFERENCE_DIR

The reference was made by running the authors' code (sjelassi/ebft_openrlhf @ 4064b49) unchanged on a tiny llama, in float32.
Left out: token mode (its advantages stand in another order than its tokens), attention under document masking (ours isolates
documents for blocks as well), hidden states after the final norm, KL and GSPO.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

DATA = Path(__file__).parent / "data"
POLICY_CASES = ("p00", "p01", "p02", "p06")
FEATURE_TENSORS = ("alignment", "diversity", "reward", "baseline", "advantage")


def copy_tensors(reference: Path, name: str, keep) -> None:
    with safe_open(reference / name, "pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys() if keep(key)}, DATA / name)  # noqa: SIM118


def main(reference: Path) -> None:
    DATA.mkdir(exist_ok=True)
    shutil.copytree(reference / "tiny_llama", DATA / "tiny_llama", dirs_exist_ok=True, copy_function=shutil.copyfile)

    rewards = [case for case in json.loads((reference / "rewards.json").read_text()) if case["mode"] != "token"]
    names = {case["name"] for case in rewards}
    (DATA / "rewards.json").write_text(json.dumps(rewards))
    copy_tensors(
        reference, "rewards.safetensors", lambda key: key[:4] in names and "token" not in key and "post" not in key
    )

    masks = [case for case in json.loads((reference / "masks.json").read_text()) if not case["document_masking"]]
    names = {case["name"] for case in masks}
    (DATA / "masks.json").write_text(json.dumps(masks))
    copy_tensors(reference, "masks.safetensors", lambda key: key.split(".")[0] in names)

    for run in ("e2e_A", "e2e_B"):
        settings = json.loads((reference / f"{run}.json").read_text())
        features = [
            case
            for case in settings["features"]
            if not case["qa_masking"]
            and not case["document_masking"]
            and case["embed_method"] != "token"
            and case["hidden_state_method"] in ("concat", "stack", "middle")
        ]
        settings["features"] = features
        settings["policy"] = [case for case in settings["policy"] if case["name"] in POLICY_CASES]
        (DATA / f"{run}.json").write_text(json.dumps(settings))
        kept = {f"{case['name']}.{tensor}" for case in features for tensor in FEATURE_TENSORS}
        kept |= {"hidden.concat.docmask0", "hidden.stack.docmask0"}
        copy_tensors(reference, f"{run}_features.safetensors", lambda key, kept=kept: key in kept)
        copy_tensors(
            reference, f"{run}_policy.safetensors", lambda key: key[:3] in POLICY_CASES and "rl.grad." not in key
        )
        kept = {
            "tokens",
            "doc_ids",
            "fixed.full_sequences",
            "fixed.qa_masks_full",
            "greedy.docmask0.full_sequences",
            "greedy.docmask0.block_logits",
        }
        copy_tensors(reference, f"{run}_rollout.safetensors", lambda key, kept=kept: key in kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
