"""Whether a part is of the kind that its place wants: by members, by how it is called, by class."""

from typing import Protocol

import pytest
import torch
from torch import nn

from components.advantages import RLOO
from components.data import Rows, StreamedText
from components.losses import PolicyGradientLoss
from components.rewards import FeatureMatchingReward
from components.training import Optimizer, Scheduler
from components.training.kinds import mismatch
from components.types import Advantage, Loss, Reward


class Scorer(Protocol):
    """A protocol of this test: data, a property, a method with a keyword-only argument, and a call."""

    scale: float

    @property
    def name(self) -> str: ...

    def score(self, text: str, *, strict: bool) -> float: ...

    def __call__(self, text: str) -> float: ...


class Good:
    def __init__(self):
        self.scale = 1.0

    @property
    def name(self):
        raise AssertionError("a property may be expensive: it is not for a check to ask for it")

    def score(self, text, *, strict=False, more=None):
        return 0.0

    def __call__(self, anything, more=2):
        return 0.0


class NoStrict(Good):
    def score(self, text):
        return 0.0


class TwoTexts(Good):
    def __call__(self, one, two):
        return 0.0


class NoScale(Good):
    def __init__(self):
        pass


class Module(nn.Module):
    """Its __call__ is nn.Module's, which takes anything: forward counts."""

    scale, name, score = 1.0, "m", Good.score

    def forward(self, one, two):
        return one


def test_a_protocol_wants_members_and_calls():
    assert mismatch(Good(), Scorer) is None
    assert mismatch(NoScale(), Scorer) == "NoScale is no Scorer (it lacks scale); name a component of that kind"
    assert "(its score cannot be called with (text, strict))" in mismatch(NoStrict(), Scorer)
    assert "(it cannot be called with (text))" in mismatch(TwoTexts(), Scorer)
    assert "(it cannot be called with (text))" in mismatch(Module(), Scorer)
    assert mismatch(len, Scorer).startswith("len is no Scorer (it lacks name, scale, score)")


def test_one_of_a_union_is_enough_and_other_annotations_are_not_looked_into():
    assert mismatch(3, int | str) is None
    assert mismatch(None, Scorer | None) is None
    assert mismatch(3.0, int | str) == "float is no int or str (it is of another class); name a component of that kind"
    assert mismatch(3, Scorer | None).startswith("int is no Scorer (")
    assert mismatch(3, list[int]) is None
    assert mismatch(3, "whatever") is None


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (FeatureMatchingReward(whitening="none"), Reward),
        (RLOO(), Advantage),
        (PolicyGradientLoss(), Loss),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), Optimizer),
    ],
)
def test_parts_are_of_their_kind_and_of_no_other(part, kind):
    assert mismatch(part, kind) is None
    for other in {Reward, Advantage, Loss, Optimizer} - {kind}:
        assert mismatch(part, other)
    assert mismatch(part, Rows | StreamedText)


def test_optimizers_and_schedules_that_want_more_than_a_step_are_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = torch.optim.lr_scheduler
    assert mismatch(schedules.StepLR(optimizer, step_size=1), Scheduler) is None
    plateau = mismatch(schedules.ReduceLROnPlateau(optimizer), Scheduler)
    assert plateau.startswith("ReduceLROnPlateau is no Scheduler (its step cannot be called with ())")
    lbfgs = torch.optim.LBFGS([nn.Parameter(torch.zeros(1))])
    assert mismatch(lbfgs, Optimizer).startswith("LBFGS is no Optimizer (its step cannot be called with ())")
