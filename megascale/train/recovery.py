"""What a new phase costs at first: the loss when parameters are added, and the tokens until it is back where it was."""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 10
"""Steps whose mean loss is compared."""


@dataclass
class Recovery:
    """The last losses, and those at the start of the phase under way; saved with every checkpoint.

    Attributes:
        recent: losses of the last steps, at most WINDOW.
        before: mean of `recent` when the phase began; none in the first phase.
        tokens: loss tokens of the run when the phase began.
        steps: of the phase so far.
        recovered: whether the mean of WINDOW steps of the phase has come down to `before`.
    """

    recent: list[float] = field(default_factory=list)
    before: float | None = None
    tokens: int = 0
    steps: int = 0
    recovered: bool = False

    def begin(self, tokens: int) -> None:
        """A phase after the first begins."""
        self.before = sum(self.recent) / len(self.recent) if self.recent else None
        self.recent, self.tokens, self.steps, self.recovered = [], tokens, 0, False

    def add(self, loss: float, tokens: int) -> dict[str, float]:
        """Take the loss of a step, after which the run has seen `tokens`; what there is to log, each number once a phase."""
        self.recent = [*self.recent[-WINDOW + 1 :], loss]
        self.steps += 1
        if self.before is None:
            return {}
        metrics: dict[str, float] = {}
        if self.steps == 1:
            metrics["phase/loss_bump"] = loss - self.before
        mean = sum(self.recent) / len(self.recent)
        if not self.recovered and len(self.recent) == WINDOW and mean <= self.before:
            self.recovered = True
            metrics["phase/tokens_to_recover"] = tokens - self.tokens
        return metrics
