"""Arithmetic on one row's numbers, float64 scalars on the device: logarithms of sums, and the root that is alpha.

K, delta and f as in osd.log_partition and osd.kernels.common: K'(delta) is the mean of the gap under q, f = K' - target is
KL(q||pi_theta) - KL(q||pi_t), and alpha - 1/2 is its root.
"""

import triton
import triton.language as tl

# Two interpolants of K that agree to this have found alpha to about a fifth of it, or are wrong alike.
_AGREEMENT: tl.constexpr = tl.constexpr(1e-4)
_LEVEL_AGREEMENT: tl.constexpr = tl.constexpr(2e-6)
# What a guess may be off, as its own sums show it. A level is rounded to float32, and log q is made with it.
_ALPHA_TOLERANCE: tl.constexpr = tl.constexpr(3e-5)
_LEVEL_TOLERANCE: tl.constexpr = tl.constexpr(2e-5)
_STEP_TOLERANCE: tl.constexpr = tl.constexpr(2e-5)
# Sums of float32 terms are known to about this share of themselves.
_ROUNDING: tl.constexpr = tl.constexpr(1.5e-7)


@triton.jit
def log1p(x):
    """log(1 + x), with the digits of a small x."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4))))
    return tl.where(x < 1e-4, series, tl.log(1 + x))


@triton.jit
def lse_at_peak(rest, top):
    """log(1 + rest e^top): log sum exp relative to a token of weight 1, the others' sum being scaled by e^-top."""
    near = tl.minimum(top, 600.0)  # e^709 is the last that float64 holds, and 1 does not count beside it
    return log1p(rest * tl.exp(near)) + (top - near)


@triton.jit
def _ratio(a, b):
    """a / b to float32's precision: a float64 division costs as much as the rest of a Newton step."""
    return (a.to(tl.float32) / b.to(tl.float32)).to(tl.float64)


@triton.jit
def _root(delta, f, k2, c2, c3, c4, c5, c6, STEPS: tl.constexpr):
    """Newton for f + k2 d + c2 d^2 + ... + c6 d^6 = 0 within [-1/2, 1/2]."""
    for _ in tl.static_range(STEPS):
        value = f + delta * (k2 + delta * (c2 + delta * (c3 + delta * (c4 + delta * (c5 + delta * c6)))))
        slope = k2 + delta * (2 * c2 + delta * (3 * c3 + delta * (4 * c4 + delta * (5 * c5 + delta * 6 * c6))))
        new = delta - _ratio(value, tl.where(slope > 0, slope, tl.where(k2 > 0, k2, 1.0)))
        delta = tl.minimum(tl.maximum(new, -0.5), 0.5)
    return delta


@triton.jit
def _level(delta, m, k2, c2, c3, c4, c5, c6):
    """K(delta) - K(0) by the same polynomial. Times constants: a float64 division takes thirty instructions."""
    tail = c2 * (1 / 3) + delta * (c3 * (1 / 4) + delta * (c4 * (1 / 5) + delta * (c5 * (1 / 6) + delta * c6 * (1 / 7))))
    return delta * (m + delta * (k2 / 2 + delta * tail))


@triton.jit
def solve_interpolated(k_mid, m, k2, k3, k_low, k_high, m_low, m_high, target, pinned, low, high):
    """Alpha from K at -1/2, 0 and 1/2 alone: K(0) and three derivatives, and K and K' at both ends.

    Interpolates K' by its value, slope and curvature at 0 and its integrals to both ends (degree 4), and from there by its
    values at the ends as well (degree 6). That the two agree is no proof: one row in a hundred of those is further off than
    they differ. See `refuted`.
    pinned: an alpha that is given, NaN for none.
    Returns (alpha, K(alpha - 1/2), whether alpha is inside its bounds, or given, and the two agree on it and on K there).
    """
    f = m - target
    even, odd = (k_high + k_low) * 0.5 - k_mid - k2 * 0.125, (k_high - k_low) - m - k3 * (1 / 24)
    # Degree 4: c3 d^3 + c4 d^4 with even = c3/64, odd = c4/80.
    a3, a4 = 64 * even, 80 * odd
    # Degree 6, with the values at the ends: odd powers from `even`, even powers from `odd`.
    rise, bend = (m_high - m_low) * 0.5 - k2 * 0.5, (m_high + m_low) * 0.5 - m - k3 * 0.125
    c5 = 96 * (rise - 8 * even)
    c3 = 8 * rise - c5 * 0.25
    c6 = 224 * bend - 1120 * odd
    c4 = 16 * bend - c6 * 0.25
    # A gap that does not vary: f is 0, or of one sign for every alpha.
    start = tl.minimum(tl.maximum(-_ratio(f, tl.where(k2 > 0, k2, 1.0)), -0.4), 0.4)
    quintic = _root(start, f, k2, k3 * 0.5, a3, a4, 0.0, 0.0, STEPS=4)
    septic = _root(quintic, f, k2, k3 * 0.5, c3, c4, c5, c6, STEPS=3)
    free = pinned != pinned
    agree = (tl.abs(septic - quintic) < _AGREEMENT) & (0.5 + septic > low) & (0.5 + septic < high)
    alpha = tl.where(free, tl.minimum(tl.maximum(0.5 + septic, low), high), pinned)
    alpha = alpha.to(tl.float32).to(tl.float64)
    delta = alpha - 0.5
    level = _level(delta, m, k2, k3 * 0.5, c3, c4, c5, c6)
    agree_on_level = tl.abs(level - _level(delta, m, k2, k3 * 0.5, a3, a4, 0.0, 0.0)) < _LEVEL_AGREEMENT
    return alpha, k_mid + level, (agree | (free == 0)) & agree_on_level


@triton.jit
def refuted(f, m1, m2, rest, log_sum, alpha_guessed, level_guessed):
    """Whether a guess is off, by the sums at that alpha: f, which must be 0, the gap's moments, and log of q's total."""
    alpha_off = tl.abs(f) > _ALPHA_TOLERANCE * (m2 - m1 * m1) + 2 * rounding_of(rest, m2)
    level_off = tl.abs(log_sum) > _LEVEL_TOLERANCE
    return (alpha_guessed & (alpha_off | level_off)) | (level_guessed & level_off)


@triton.jit
def newton_step(alpha, f, k2, k3, k4, noise, left, right, last, low, high):
    """One step of the safeguarded search for the zero of the increasing f(alpha), from its first three derivatives.

    left, right: the bracket; low - 1 and high + 1 while that bound has not been tried. last: size of the step before.
    noise: what f is known to. Returns (alpha, left, right, last, settled).
    """
    left, right = tl.where(f <= 0, alpha, left), tl.where(f >= 0, alpha, right)
    newton = -f / k2
    halley = -2 * f * k2 / (2 * k2 * k2 - f * k3)
    cubic = halley
    for _ in tl.static_range(2):
        slope = k2 + cubic * (k3 + cubic * k4 / 2)
        cubic = cubic - (f + cubic * (k2 + cubic * (k3 / 2 + cubic * k4 / 6))) / slope
    # The cubic's answer is better than Halley's by more than they differ.
    sure = (tl.abs(cubic - halley) < _STEP_TOLERANCE) & (tl.abs(cubic - newton) < 0.5 * tl.abs(newton) + _STEP_TOLERANCE)
    move = tl.where(sure, cubic, newton)
    new = alpha + move
    inside = (new >= left) & (new <= right)
    sure = sure & inside
    shrinks = inside & (tl.abs(move) <= last / 2)
    untried = ((new <= low) & (left < low)) | ((new >= high) & (right > high))
    middle = (tl.maximum(left, low) + tl.minimum(right, high)) / 2
    new = tl.minimum(tl.maximum(tl.where(sure | shrinks | untried, new, middle), low), high)
    still = (tl.abs(f) <= noise) | (left >= high) | (right <= low)
    new = tl.where(still, alpha, new)
    last = tl.abs(new - alpha)
    return new, left, right, last, sure | still | (last < 5e-6)


@triton.jit
def rounding_of(rest, m2):
    """What f is known to, given the off-peak mass and E[gap^2] (the gap being 0 at the peak)."""
    return _ROUNDING * (rest + tl.sqrt(rest * m2))
