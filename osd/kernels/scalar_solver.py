"""Scalar arithmetic of one row in float64 on the device: logarithms of sums, and the root that gives alpha.

K, delta and f as in osd.log_partition and osd.kernels.common: K'(delta) is the mean of the gap under q, f = K' - target is
KL(q||pi_theta) - KL(q||pi_t), and alpha - 1/2 is its root.
"""

import triton
import triton.language as tl

# If two interpolants of K agree to this, alpha is usually known to about a fifth of it. Both can also be wrong.
_AGREEMENT: tl.constexpr = tl.constexpr(1e-4)
_LEVEL_AGREEMENT: tl.constexpr = tl.constexpr(2e-6)
# Tolerances of a guess, tested with its sums. The level is rounded to float32, because log q is computed with that value.
_ALPHA_TOLERANCE: tl.constexpr = tl.constexpr(3e-5)
_LEVEL_TOLERANCE: tl.constexpr = tl.constexpr(2e-5)
_STEP_TOLERANCE: tl.constexpr = tl.constexpr(2e-5)
# Relative error of sums of float32 terms.
_ROUNDING: tl.constexpr = tl.constexpr(1.5e-7)


@triton.jit
def log1p(x):
    """Return log(1 + x), accurate for small x."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4))))
    return tl.where(x < 1e-4, series, tl.log(1 + x))


@triton.jit
def lse_at_peak(rest, top):
    """Return log(1 + rest e^top): log sum exp relative to a token of weight 1, with the other weights scaled by e^-top."""
    near = tl.minimum(top, 600.0)  # float64 overflows beyond e^709; beside e^600 the 1 is negligible
    return log1p(rest * tl.exp(near)) + (top - near)


@triton.jit
def _ratio(a, b):
    """Return a / b in float32 precision: a float64 division costs as much as the rest of a Newton step."""
    return (a.to(tl.float32) / b.to(tl.float32)).to(tl.float64)


@triton.jit
def _root(delta, f, k2, c2, c3, c4, c5, c6, STEPS: tl.constexpr):
    """Solve f + k2 d + c2 d^2 + ... + c6 d^6 = 0 for d in [-1/2, 1/2] by Newton steps from delta."""
    for _ in tl.static_range(STEPS):
        value = f + delta * (k2 + delta * (c2 + delta * (c3 + delta * (c4 + delta * (c5 + delta * c6)))))
        slope = k2 + delta * (2 * c2 + delta * (3 * c3 + delta * (4 * c4 + delta * (5 * c5 + delta * 6 * c6))))
        new = delta - _ratio(value, tl.where(slope > 0, slope, tl.where(k2 > 0, k2, 1.0)))
        delta = tl.minimum(tl.maximum(new, -0.5), 0.5)
    return delta


@triton.jit
def _level(delta, m, k2, c2, c3, c4, c5, c6):
    """Return K(delta) - K(0) by the same polynomial. Multiplies by constants: a float64 division is thirty instructions."""
    tail = c2 * (1 / 3) + delta * (c3 * (1 / 4) + delta * (c4 * (1 / 5) + delta * (c5 * (1 / 6) + delta * c6 * (1 / 7))))
    return delta * (m + delta * (k2 / 2 + delta * tail))


@triton.jit
def solve_interpolated(k_mid, m, k2, k3, k_low, k_high, m_low, m_high, target, pinned, low, high):
    """Interpolate alpha from K(0) with three derivatives, and K and K' at -1/2 and 1/2.

    The first interpolant of K' (degree 4) uses its value, slope and curvature at 0 and its integrals to both ends. The
    second one (degree 6) starts from that solution and also uses the values at the ends. Agreement is no proof: in one of
    a hundred rows that agree, alpha is further off than the two differ. `refuted` detects those rows.
    pinned: the given alpha, or NaN.
    Returns (alpha, K(alpha - 1/2), agree). agree is True if alpha is given or inside its bounds, and both interpolants
    agree on alpha and on K there.
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
    # If the gap does not vary, k2 is 0, and f is 0 or has the same sign for every alpha.
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
    """Return True if the sums at the guessed alpha reject the guess.

    f must be 0, and so must log_sum, the logarithm of the total of q. m1, m2: moments of the gap.
    """
    alpha_off = tl.abs(f) > _ALPHA_TOLERANCE * (m2 - m1 * m1) + 2 * rounding_of(rest, m2)
    level_off = tl.abs(log_sum) > _LEVEL_TOLERANCE
    return (alpha_guessed & (alpha_off | level_off)) | (level_guessed & level_off)


@triton.jit
def newton_step(alpha, f, k2, k3, k4, noise, left, right, last, low, high):
    """Make one safeguarded step towards the zero of the increasing f(alpha), given its first three derivatives.

    left, right: the bracket; low - 1 or high + 1 until that bound was evaluated. last: size of the previous step.
    noise: error of f. Returns (alpha, left, right, last, settled).
    """
    left, right = tl.where(f <= 0, alpha, left), tl.where(f >= 0, alpha, right)
    newton = -f / k2
    halley = -2 * f * k2 / (2 * k2 * k2 - f * k3)
    cubic = halley
    for _ in tl.static_range(2):
        slope = k2 + cubic * (k3 + cubic * k4 / 2)
        cubic = cubic - (f + cubic * (k2 + cubic * (k3 / 2 + cubic * k4 / 6))) / slope
    # The error of the cubic step is smaller than its difference to the Halley step.
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
    """Return the rounding error of f, given the off-peak mass and E[gap^2], where the gap is 0 at the peak."""
    return _ROUNDING * (rest + tl.sqrt(rest * m2))
