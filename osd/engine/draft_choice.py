"""Choice of the number of drafts, measured while the engine runs, per batch size (`num_speculative_tokens="auto"`).

A step with k drafts takes c(k) seconds and gives each request t(k) tokens on average. The time of a token, c(k) / t(k), has one
minimum over k where c is linear and drafts are accepted alike (theory, Theorem 21). So the search tries a neighbour, and stays
with it if that is faster. c(k) is measured for each k; t of all k follows from one acceptance rate per place of a draft, which
steps with any number of drafts measure, at any batch size. When acceptance changes, the k that were tried before are compared
anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

_FIRST = 8  # steps without drafts that are measured before anything is tried
_TRIAL = 4  # steps that a trial takes
_SKIPPED = 2  # steps after a change of k that are not measured: with async scheduling two steps overlap
_MEMORY = 16  # steps whose median is the time of a step: one that was interrupted must not decide
_REMEMBERED = 64  # steps whose acceptance counts, about
_FASTER = 0.97  # of the best number's time per token: a number that was measured before is taken without a trial
_ALLOWANCE = 0.015  # share of the time that trials may cost, after the first


class _Acceptance:
    """Acceptance rate of a draft at each place of a cycle, given that the drafts before it were accepted."""

    def __init__(self, most: int) -> None:
        self._verdicts = [0.0] * most
        self._accepted = [0.0] * most

    def add(self, drafts: int, tokens: Sequence[int]) -> None:
        """Count the verdicts of one step: ``tokens`` of each request, at most ``drafts`` + 1. Older steps count less."""
        for place in range(len(self._verdicts)):
            self._verdicts[place] *= 1 - 1 / _REMEMBERED
            self._accepted[place] *= 1 - 1 / _REMEMBERED
            if place < drafts:
                self._verdicts[place] += sum(count > place for count in tokens)
                self._accepted[place] += sum(count > place + 1 for count in tokens)

    def tokens(self, drafts: int) -> float:
        """Return the expected tokens of a cycle; a place without verdicts has the rate of the place before it."""
        rate, chance, total = 0.0, 1.0, 1.0
        for verdicts, accepted in zip(self._verdicts[:drafts], self._accepted, strict=False):
            rate = accepted / verdicts if verdicts else rate
            chance *= rate
            total += chance
        return total


@dataclass
class _Bucket:
    """Measurements of batches of about one size.

    Attributes:
        costs: seconds of the last steps by number of drafts.
        best: the fastest number of drafts so far.
        trial: the number of drafts that is being tried, and how many steps are left; None: none is.
        tried: the neighbours of `best` that were tried since it became the best.
        spent: seconds of all steps.
        lost: seconds that trials took longer than the same tokens would have taken at the best number of drafts.
    """

    costs: dict[int, deque[float]] = field(default_factory=dict)
    best: int = 0
    trial: tuple[int, int] | None = None
    tried: list[int] = field(default_factory=list)
    spent: float = 0.0
    lost: float = 0.0


class DraftChooser:
    """Chooses the number of drafts of a step.

    Trials that turn out slower may cost 1.5% of the time that was spent, so a pair for which no draft pays loses about that and
    one trial.

    Args:
        most: the largest number of drafts.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._acceptance = _Acceptance(most)
        self._buckets: dict[int, _Bucket] = {}
        self._last: int | None = None
        self._since = 0

    def choose(self, batch: int) -> int:
        """Return the number of drafts for the next step of `batch` requests."""
        bucket = self._bucket(batch)
        return bucket.best if bucket.trial is None else bucket.trial[0]

    def observe(self, drafts: int, seconds: float, tokens: Sequence[int]) -> None:
        """Record the time and the tokens of one step.

        Args:
            drafts: of each request.
            seconds: from the end of the step before to its end.
            tokens: how many tokens each request got, from 1 to drafts + 1.
        """
        self._since = self._since + 1 if drafts == self._last else 0
        self._last = drafts
        self._acceptance.add(drafts, tokens)
        bucket = self._bucket(len(tokens))
        if drafts != bucket.best and bucket.best in bucket.costs:
            bucket.lost += seconds - sum(tokens) / len(tokens) * self._per_token(bucket, bucket.best)
        bucket.spent += seconds
        if self._since < _SKIPPED:
            return
        bucket.costs.setdefault(drafts, deque(maxlen=_MEMORY)).append(seconds)
        self._advance(bucket, drafts)

    def _advance(self, bucket: _Bucket, drafts: int) -> None:
        if bucket.trial is not None:
            tried, left = bucket.trial
            bucket.trial = (tried, left - (drafts == tried))
            if left > 1 or drafts != tried:
                return
            bucket.trial = None
            if self._per_token(bucket, tried) < self._per_token(bucket, bucket.best):
                bucket.best, bucket.tried = tried, [bucket.best]
        elif bucket.best in bucket.costs:
            known = min(bucket.costs, key=lambda k: self._per_token(bucket, k))
            if self._per_token(bucket, known) < _FASTER * self._per_token(bucket, bucket.best):
                bucket.best, bucket.tried = known, []
        if len(bucket.costs.get(bucket.best, ())) < (_TRIAL if bucket.best else _FIRST):
            return
        price = 0.5 * _TRIAL * median(bucket.costs[bucket.best])  # what the next trial may lose
        if len(bucket.costs) == 1 or bucket.lost <= _ALLOWANCE * bucket.spent - price:
            bucket.trial = (self._neighbour(bucket), _TRIAL)

    def _per_token(self, bucket: _Bucket, drafts: int) -> float:
        return median(bucket.costs[drafts]) / self._acceptance.tokens(drafts)

    def _neighbour(self, bucket: _Bucket) -> int:
        """Return the neighbour of the best number that was tried the longest ago."""
        neighbours = [k for k in (bucket.best + 1, bucket.best - 1) if 0 <= k <= self.most]
        chosen = next((k for k in neighbours if k not in bucket.tried), None)
        if chosen is None:
            chosen, bucket.tried = neighbours[0], []
        bucket.tried.append(chosen)
        return chosen

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets.setdefault(batch.bit_length(), _Bucket())
