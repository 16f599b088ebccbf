"""Components that tests of evaluation name in YAML: prompts with records, and a verifier that needs no sandbox."""

import torch

from components.evaluation import Measure, Row

LENGTH = 16


class Prompts:
    """Seven prompts of different lengths, each with a completion, a record and one of three groups."""

    fingerprint = "seven prompts"

    def __init__(self, *, tokenizer):
        self.records = [
            {
                "id": f"record {i}",
                "group": f"group {i % 3}",
                "prompt": "def f(x, y):"[: 5 + i],
                "completion": f"return [{i}]",
            }
            for i in range(7)
        ]
        self.pad_id = tokenizer.pad_id
        self.encoded = [(tokenizer.encode(r["prompt"]), tokenizer.encode(r["completion"])) for r in self.records]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        prompt, completion = self.encoded[index]
        tokens = torch.full((2 * LENGTH,), self.pad_id)
        tokens[: len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        position = torch.arange(len(tokens))
        inside = position < len(prompt) + len(completion)
        return {
            "tokens": tokens,
            "doc_ids": torch.where(inside, 0, -1),
            "target_mask": inside & (position >= len(prompt)),
            "record": self.records[index],
            "group": self.records[index]["group"],
        }


class Digits:
    """Full marks to completions with an even number of characters, half of them to the others."""

    def __call__(self, completions, records):
        assert len(completions) == len(records)
        return [1.0 if len(text) % 2 == 0 else 0.5 for text in completions]


class Empty(Measure):
    """A measure of nothing."""

    def __call__(self, policy, batch, rng):
        return [Row(sums={"padding": [0.0, 0.0], "tokens": [0.0, 0.0]}) for _ in batch.tokens]


class Broken(Measure):
    """A measure with a mistake of its author's."""

    def __call__(self, policy, batch, rng):
        first, second = (1, 2, 3)
        return [first, second]
