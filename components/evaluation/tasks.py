"""Tasks: whole completions of prompts, judged by a verifier or against reference translations."""

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF

from components.blocks import CompletionAnchor
from components.data import HFTokenizer, Rows, collate
from components.evaluation.measures import Measure, Row
from components.evaluation.statistics import pass_at_k
from components.models import Policy
from components.rewards import Verifier, verified
from components.rollouts import BlockParallelGenerator
from components.types import Batch


class _Generation(Measure):
    """What measures of completions share: rows with a record each, longest prompts first, so that a batch holds prompts of
    about one length, is cut to the longest of them, and what does not fit into memory fails at once."""

    def __init__(
        self, *, dataset: Rows, batch_size: int, generator: BlockParallelGenerator, tokenizer: HFTokenizer
    ) -> None:
        if not isinstance(generator.anchors, CompletionAnchor):
            raise ValueError(
                f"generator.anchors is {type(generator.anchors).__name__}, and completions start where prompts end; use "
                "components.rollouts.CompletionAnchor"
            )
        if not generator.stop_tokens:
            raise ValueError(
                "generator.stop_tokens is empty: no completion would ever end; name at least the EOS token"
            )
        super().__init__(dataset=dataset, batch_size=batch_size)
        if "record" not in dataset[0]:
            raise ValueError("dataset gives no records to judge completions by; use one that has a record in every row")
        batch = collate([dataset[index] for index in range(len(dataset))])
        anchors = generator.anchors(batch, generator.rollout_len)
        if not anchors.mask.all():
            raise ValueError(f"row {int((~anchors.mask[:, 0]).nonzero()[0])} of dataset has no prompt; leave it out")
        lengths = anchors.positions[:, 0]
        order = lengths.argsort(descending=True, stable=True).tolist()
        self.dataset = _Picked(dataset, order)
        self.reach = int(lengths.max()) + generator.rollout_len
        self.generator = generator
        self.tokenizer = tokenizer

    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> list[Row]:
        """Complete the prompts, and judge."""
        longest = int(self.generator.anchors(batch, self.generator.rollout_len).positions.max())
        prompts = replace(
            batch,
            tokens=batch.tokens[:, :longest],
            doc_ids=batch.doc_ids[:, :longest],
            target_mask=batch.target_mask[:, :longest],
        )
        rollouts = self.generator(policy, prompts, rng)
        stops = torch.tensor(self.generator.stop_tokens, device=rollouts.tokens.device)
        tokens, mask = rollouts.tokens[:, :, 0], rollouts.mask[:, :, 0]  # [B, n, G]
        ends = torch.isin(tokens, stops) & mask
        texts = [
            [self.tokenizer.decode(sample[kept].tolist()) for sample, kept in zip(*samples, strict=True)]
            for samples in zip(tokens, mask & ~ends, strict=True)
        ]
        assert batch.records is not None
        judged = self.judge(texts, batch.records)
        n = tokens.shape[1]
        rows = []
        for row, (sums, text) in enumerate(judged):
            prompt = batch.tokens[row, : int(rollouts.anchors[row, 0])].tolist()
            rows.append(
                Row(
                    sums=sums
                    | {
                        "finished": [float(ends[row].any(dim=-1).sum()), float(n)],
                        "tokens": [float(mask[row].sum()), float(n)],
                    },
                    text={"id": batch.records[row].get("id"), "prompt": self.tokenizer.decode(prompt)} | text,
                )
            )
        return rows

    @abstractmethod
    def judge(
        self, texts: list[list[str]], records: list[dict[str, Any]]
    ) -> list[tuple[dict[str, list[float]], dict[str, Any]]]:
        """Statistics, and what to keep for reading, of the samples ``texts[row]`` of every record."""


class Completions(_Generation):
    """Completions scored by a verifier.

    ``score`` is the mean of the verifier's scores, ``pass@k`` the chance that one of ``k`` samples gets full marks,
    ``finished`` the share of completions that ended with a stop token rather than for want of room, ``tokens`` their mean
    length.

    Args:
        dataset: prompts, with a record in every row (``components.data.PromptCompletion``).
        batch_size: rows at a time.
        generator: with ``CompletionAnchor`` and stop tokens. Greedy (temperature 0, one sample) for ``pass@1`` as it is mostly
            reported; ``n`` samples for the unbiased ``pass@k``.
        verifier: see ``components.rewards.Verifier``.
        tokenizer: the recipe gives it.
        ks: the ``k`` of ``pass@k``, none above the number of samples.

    Raises:
        ValueError: rows without records or prompts, another anchor, no stop tokens, or too few samples.
    """

    def __init__(
        self,
        *,
        dataset: Rows,
        batch_size: int,
        generator: BlockParallelGenerator,
        verifier: Verifier,
        tokenizer: HFTokenizer,
        ks: Sequence[int] = (1,),
    ) -> None:
        super().__init__(dataset=dataset, batch_size=batch_size, generator=generator, tokenizer=tokenizer)
        if not all(1 <= k <= generator.num_samples for k in ks):
            raise ValueError(
                f"ks are {list(ks)} with generator.num_samples {generator.num_samples}; draw as many samples"
            )
        if generator.temperature == 0 and generator.num_samples > 1:
            raise ValueError("generator.temperature is 0, so that all samples would be alike; set num_samples to 1")
        self.verifier = verifier
        self.ks = list(ks)

    def judge(
        self, texts: list[list[str]], records: list[dict[str, Any]]
    ) -> list[tuple[dict[str, list[float]], dict[str, Any]]]:
        """See the class."""
        n = self.generator.num_samples
        scores = verified(
            self.verifier,
            [text for samples in texts for text in samples],
            [record for record in records for _ in range(n)],
        )
        judged = []
        for row, samples in enumerate(texts):
            own = scores[row * n : (row + 1) * n]
            correct = sum(score >= 1 for score in own)
            sums = {f"pass@{k}": [pass_at_k(n, correct, k), 1.0] for k in self.ks}
            judged.append((sums | {"score": [sum(own), float(n)]}, {"completions": samples, "scores": own}))
        return judged


class Translation(_Generation):
    """Translations against references: corpus ``bleu`` and ``chrf`` as sacrebleu's command line gives them, in percent.

    Args:
        dataset: prompts, with a record in every row, whose ``completion`` is the reference.
        batch_size: rows at a time.
        generator: with ``CompletionAnchor``, stop tokens and one sample.
        tokenizer: the recipe gives it.
        bleu_tokenize: sacrebleu's ``--tokenize``, such as ``zh`` or ``ja-mecab``.
        comet: a COMET model by its name or file, such as ``Unbabel/wmt22-comet-da``, for the mean of its segment scores
            besides; records then have a ``source``.

    Raises:
        ValueError: rows without records or prompts, another anchor, no stop tokens, several samples, or COMET without its
            package.
    """

    def __init__(
        self,
        *,
        dataset: Rows,
        batch_size: int,
        generator: BlockParallelGenerator,
        tokenizer: HFTokenizer,
        bleu_tokenize: str = "13a",
        comet: str | None = None,
    ) -> None:
        super().__init__(dataset=dataset, batch_size=batch_size, generator=generator, tokenizer=tokenizer)
        if generator.num_samples != 1:
            raise ValueError(
                f"generator.num_samples is {generator.num_samples}; a corpus has one translation of each text"
            )
        self.metrics: dict[str, BLEU | CHRF] = {"bleu": BLEU(tokenize=bleu_tokenize), "chrf": CHRF()}
        self.combine = {name: name for name in self.metrics}
        for name, metric in self.metrics.items():
            metric.corpus_score([""], [[""]])  # a signature names the number of references, known from here on
            self.notes[name] = str(metric.get_signature())
        self.comet = None if comet is None else _load_comet(comet)
        if comet is not None:
            self.notes["comet"] = comet

    def judge(
        self, texts: list[list[str]], records: list[dict[str, Any]]
    ) -> list[tuple[dict[str, list[float]], dict[str, Any]]]:
        """See the class."""
        # In one line, as files of translations are.
        ours = [" ".join(text.split()) for (text,) in texts]
        references = [" ".join(str(record["completion"]).split()) for record in records]
        judged: list[tuple[dict[str, list[float]], dict[str, Any]]] = [
            ({}, {"source": record.get("source"), "completion": text, "reference": reference})
            for record, text, reference in zip(records, ours, references, strict=True)
        ]
        for name, metric in self.metrics.items():
            # Not public, but what sacrebleu's own significance tests are made of.
            for (sums, _), statistics in zip(
                judged, metric._extract_corpus_statistics(ours, [references]), strict=True
            ):
                sums[name] = [float(number) for number in statistics]
        if self.comet is not None:
            data = [
                {"src": record["source"], "mt": text, "ref": reference}
                for record, text, reference in zip(records, ours, references, strict=True)
            ]
            scores = self.comet.predict(data, gpus=int(torch.cuda.is_available()), progress_bar=False).scores
            for (sums, _), score in zip(judged, scores, strict=True):
                sums["comet"] = [float(score), 1.0]
        return judged


def _load_comet(name: str) -> Any:
    try:
        comet = importlib.import_module("comet")
    except ImportError as error:
        raise ValueError(
            f"comet is {name!r}, and the package unbabel-comet is not installed; install it (up to 2.2.7 it insists on numpy "
            "below 2, so with --no-deps), or leave comet out and give completions/ to comet-score in another environment"
        ) from error
    return comet.load_from_checkpoint(name if name.endswith(".ckpt") else comet.download_model(name))


class _Picked:
    """Rows of a dataset in another order."""

    def __init__(self, dataset: Rows, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = indices

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[self._indices[index]]
