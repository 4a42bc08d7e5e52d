"""Positions as numbers: the frequencies of rotary embeddings, and the slopes of ALiBi.

Rotary positions turn pair i of a head's channels by the angle position * f_i, so that q.k depends on the distance only:

    f_i = theta^(-2i / rotary_dim)                   the plain ones; wavelengths 2 pi / f_i from 6 tokens to 6 theta

Every other kind stretches the context by bending these frequencies, with one `factor` or one for each pair:

    linear        all divided by the factor
    dynamic       theta grown so that the slowest pair is divided by the factor at the present length
    llama3        long wavelengths divided, short ones kept, a straight blend between (in turns per trained context)
    yarn          the same blend, along the index of the pair; cosine and sine scaled by 0.1 ln(factor) + 1
    longrope      a table of factors, another one past the trained context (Phi-3)
    proportional  only the first pairs turn, their exponents spread over the whole head

Frequencies are the float32 nearest to the exact value; angles are products of float32 numbers in every reader.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lowbit.models.spec import RopeSpec

Floats = NDArray[np.float64]
ALIBI_BIAS_MAX = 8.0


def inverse_frequencies(rope: RopeSpec, length: int) -> NDArray[np.float32]:
    """Angle per position of each pair, [rotary_dim / 2], for a sequence of `length` tokens.

    The length matters only where `rope.depends_on_length`; others return the same frequencies for any.
    """
    exponents = np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim
    plain = rope.theta**-exponents
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "dynamic":
        plain = _dynamic_theta(rope, length) ** -exponents
    elif rope.kind == "llama3":
        plain = _blend_by_wavelength(rope, plain)
    elif rope.kind == "yarn":
        plain = _blend_by_index(rope, plain)
    elif rope.kind == "longrope":
        factors = rope.long_factors if length > rope.trained_positions else rope.short_factors
        plain = plain / np.array(factors)
    elif rope.kind == "proportional":
        turning = int(rope.turned_fraction * rope.rotary_dim // 2)
        plain = np.where(np.arange(len(plain)) < turning, plain, 0.0) / rope.factor
    return plain.astype(np.float32)


def rotation(rope: RopeSpec, positions: NDArray[np.int64], length: int) -> tuple[Floats, Floats]:
    """Cosine and sine for each position and pair, both [positions, rotary_dim / 2], attention factor included."""
    angles = positions[:, None] * inverse_frequencies(rope, length).astype(np.float64)
    return np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor


def alibi_slopes(heads: int, bias_max: float = ALIBI_BIAS_MAX) -> tuple[float, ...]:
    """The slope of each head: 2^(-bias_max k / n) for k = 1..n where n is a power of two.

    Other counts take every second slope of the next power of two, then the ones between, until there are enough.
    """
    count = 1 << max(heads - 1, 0).bit_length()
    slopes = [2.0 ** (-bias_max * k / count) for k in range(1, count + 1)]
    return tuple(slopes if count == heads else (slopes[1::2] + slopes[::2])[:heads])


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """What yarn multiplies cosine and sine by: attention over a longer context gets a sharper softmax."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention_factor(factor: float, trained_positions: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(trained_positions)) if factor > 1 else 1.0


def _dynamic_theta(rope: RopeSpec, length: int) -> float:
    stretch = rope.factor * max(length, rope.trained_positions) / rope.trained_positions - (rope.factor - 1)
    return float(rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _blend_by_wavelength(rope: RopeSpec, plain: Floats) -> Floats:
    turns = rope.trained_positions * plain / (2 * math.pi)  # how often a pair goes round in the trained context
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / rope.factor


def _blend_by_index(rope: RopeSpec, plain: Floats) -> Floats:
    def index_of(turns: float) -> float:
        """The (fractional) index of the pair that goes round this often in the trained context."""
        wavelength = rope.trained_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    width = last - first if last != first else 0.001  # a step rather than a division by zero
    divided = np.clip((np.arange(len(plain)) - first) / width, 0, 1)
    blended: Floats = divided * plain / rope.factor + (1 - divided) * plain
    return blended
