"""Measurements: each file is a command. Timing belongs here and not into tests."""

import components  # noqa: F401  # before torchtune and torchao, whose first import it checks and quietens
