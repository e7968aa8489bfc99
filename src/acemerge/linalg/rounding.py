"""What is told apart from rounding."""

from __future__ import annotations

# What comes to at most this share of what it is made of is zero: a direction of a matrix against its largest one, a sum
# against its terms. It lies well above the noise of float32: rounded to it a matrix is off by 1.2e-7 of its largest
# singular value at most. One share for both types: the type that a layer is computed in does not decide what there is.
NULL = 2.0**-21
