"""Pure mathematics on tensors: rotations as products of sparse factors, and rounding."""
