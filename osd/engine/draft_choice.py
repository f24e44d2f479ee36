"""Choice of the number of drafts, measured while the engine runs, per batch size (`num_speculative_tokens="auto"`).

A step with k drafts takes c(k) seconds and gives each request t(k) tokens. The time of a token, c(k) / t(k), has one minimum
over k where c is linear and drafts are accepted alike (theory, Theorem 21). So the search moves to a neighbour whenever that is
faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_FIRST = 8  # steps without drafts that are measured before anything is tried
_TRIAL = 4  # steps that a trial takes
_SKIPPED = 2  # steps after a change of k that are not measured: with async scheduling two steps overlap
_MEMORY = 0.1  # weight of the newest step in the running means
_ALLOWANCE = 0.015  # share of the time without drafts that trials may cost


@dataclass
class _Mean:
    """Running means of the steps with one number of drafts."""

    seconds: float = 0.0
    tokens: float = 0.0
    steps: int = 0

    def add(self, seconds: float, tokens: float) -> None:
        self.steps += 1
        weight = max(_MEMORY, 1 / self.steps)
        # One step that was interrupted (by a garbage collection, another process) must not decide.
        seconds = min(seconds, 3 * self.seconds) if self.steps > 2 else seconds
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens


@dataclass
class _Bucket:
    """Measurements of batches of about one size.

    Attributes:
        means: by number of drafts.
        best: the fastest number of drafts so far.
        trial: the number of drafts that is being tried, and how many steps are left; None: none is.
        spent: seconds of all steps.
        lost: seconds that trials took longer than the same tokens would have taken at the best number of drafts.
    """

    means: dict[int, _Mean] = field(default_factory=dict)
    best: int = 0
    trial: tuple[int, int] | None = None
    spent: float = 0.0
    lost: float = 0.0
    tried: list[int] = field(default_factory=list)


class DraftChooser:
    """Chooses the number of drafts of a step.

    Trials that turn out slower may cost 1.5% of the time that was spent, so that a pair for which no draft pays loses no more.

    Args:
        most: the largest number of drafts.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._buckets: dict[int, _Bucket] = {}
        self._last: int | None = None
        self._since = 0

    def choose(self, batch: int) -> int:
        """Return the number of drafts for the next step of `batch` requests."""
        bucket = self._bucket(batch)
        return bucket.best if bucket.trial is None else bucket.trial[0]

    def observe(self, batch: int, drafts: int, seconds: float, tokens: float) -> None:
        """Record the time and the tokens of one step.

        Args:
            batch: requests.
            drafts: of each.
            seconds: from the end of the step before to its end.
            tokens: that a request got, on average.
        """
        self._since = self._since + 1 if drafts == self._last else 0
        self._last = drafts
        if self._since < _SKIPPED or tokens <= 0:
            return
        bucket = self._bucket(batch)
        best = bucket.means.get(bucket.best)
        if best is not None and drafts != bucket.best:
            bucket.lost += seconds - tokens * best.per_token
        bucket.spent += seconds
        bucket.means.setdefault(drafts, _Mean()).add(seconds, tokens)
        self._advance(bucket, drafts)

    def _advance(self, bucket: _Bucket, drafts: int) -> None:
        if bucket.trial is not None:
            tried, left = bucket.trial
            bucket.trial = (tried, left - (drafts == tried))
            if left > 1 or drafts != tried:
                return
            bucket.trial = None
            if bucket.means[tried].per_token < bucket.means[bucket.best].per_token:
                bucket.best, bucket.tried = tried, [bucket.best]
        if bucket.best not in bucket.means or bucket.means[bucket.best].steps < _FIRST:
            return
        price = 0.5 * _TRIAL * bucket.means[bucket.best].seconds  # what the next trial may lose
        if bucket.lost <= _ALLOWANCE * bucket.spent - price:
            bucket.trial = (self._neighbour(bucket), _TRIAL)

    def _neighbour(self, bucket: _Bucket) -> int:
        """Return the neighbour of the best number that was tried the longest ago."""
        neighbours = [k for k in (bucket.best + 1, bucket.best - 1) if 0 <= k <= self.most]
        chosen = next((k for k in neighbours if k not in bucket.tried), None)
        if chosen is None:
            chosen, bucket.tried = neighbours[0], []
        bucket.tried.append(chosen)
        return chosen

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets.setdefault(max(batch, 1).bit_length(), _Bucket())
