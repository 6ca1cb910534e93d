"""The paths themselves: how exact they are, and what a layer's rotation costs on each.

Precision: the largest error of R(alpha)'s elements against the same curve in 50 digits (mpmath), for small groups, and
of what must hold of any size: orthogonality, R(a) R(b) = R(a + b), R(1/2)^2 = R. Beside it, what scipy makes of the
geodesic in float64 (expm and logm). Cost: seconds for one layer on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import torch
from scipy.linalg import expm, logm, schur
from torch import Tensor

from boft_export import Factor, InterpolationPath, Rotation, geodesic, interpolate_rotation
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.spectrum import Spectrum

ALPHA = 0.3


def rotation(num_factors: int, num_blocks: int, generators: Tensor) -> Rotation:
    """Return the rotation of skew generators (m, D, b, b)."""
    size = generators.shape[-1]
    return Rotation(
        tuple(
            Factor(cayley(generators[i]), butterfly_index(i, num_blocks, size), generators[i])
            for i in range(num_factors)
        )
    )


def random_rotation(n: int, m: int, b: int, std: float) -> Rotation:
    """Return a rotation over n features with random blocks."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, n // b, b, b, generator=generator, dtype=torch.float64) * std
    return rotation(m, n // b, skew(a))


def in_planes(angles: list[float]) -> Tensor:
    """Return the generator of one block with these angles, in planes of a random basis."""
    size = 2 * len(angles)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    s = torch.zeros(size, size, dtype=torch.float64)
    for i, angle in enumerate(angles):
        s[2 * i, 2 * i + 1] = math.tan(angle / 2) if angle < math.pi - 1e-6 else 2 / (math.pi - angle)
    generator: Tensor = skew(2 * basis @ (s - s.T) / 2 @ basis.T)[None, None]
    return generator


def exact_power(s: Tensor, alpha: float) -> mpmath.matrix:
    """Return Cayley(S)^alpha of one generator's float64 values in 50 digits, by the Hermitian -iS."""
    values, vectors = mpmath.eighe(-mpmath.mpc(0, 1) * mpmath.matrix(s.tolist()))
    phases = [mpmath.expj(-2 * alpha * mpmath.atan(w)) for w in values]
    return vectors * mpmath.diag(phases) * vectors.H


def error(found: Tensor, exact: mpmath.matrix) -> float:
    """Return the largest error of an element."""
    size = len(found)
    return max(float(abs(exact[i, j] - found[i, j].item())) for i in range(size) for j in range(size))


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def precision() -> list[dict[str, object]]:
    """Measure one block of 8 features with angles of each kind, on the geodesic."""
    rows: list[dict[str, object]] = []
    print(f"one block of 8, R({ALPHA}) on the geodesic: largest error of an element")
    print(f"{'angles':42} {'ours':>9} {'expm(logm)':>11}")
    for label, angles in {
        "0.1, 0.5, 1, 2": [0.1, 0.5, 1.0, 2.0],
        "all 1": [1.0] * 4,
        "0, 0, 0, 1": [0.0, 0.0, 0.0, 1.0],
        "all within 1e-8 of 0": [1e-8, 2e-8, 3e-8, 4e-8],
        "all within 1e-8 of pi": [math.pi - d for d in (1e-8, 0.8e-8, 0.6e-8, 0.4e-8)],
        "all pi less 1e-8": [math.pi - 1e-8] * 4,
    }.items():
        s = in_planes(angles)
        exact = exact_power(s[0, 0], ALPHA)
        whole = rotation(1, 1, s)
        found = geodesic(whole, ALPHA).dense()
        theirs = torch.from_numpy(np.real(expm(ALPHA * logm(whole.dense().numpy()))))
        rows.append({"angles": label, "ours": error(found, exact), "scipy": error(theirs, exact)})
        print(f"{label:42} {rows[-1]['ours']:9.1e} {rows[-1]['scipy']:11.1e}")
    return rows


def properties() -> list[dict[str, object]]:
    """Measure what must hold of a rotation over 256 features, with blocks small and large."""
    rows: list[dict[str, object]] = []
    print("\n256 features: residual of R(0.3) on each path, and on the geodesic what powers must be")
    print(f"{'m':>2} {'b':>3} {'std':>5} " + " ".join(f"{p:>10}" for p in InterpolationPath) + "  R(a)R(b)  R(1/2)^2")
    for m, b, std in ((1, 8, 0.05), (2, 8, 0.05), (2, 8, 2.0), (4, 8, 0.5), (6, 4, 0.5), (1, 256, 0.1)):
        whole = random_rotation(256, m, b, std)
        dense = whole.dense()
        bent = {p.value: interpolate_rotation(whole, ALPHA, p).dense() for p in InterpolationPath}
        residual = {p: float((r.T @ r - torch.eye(256)).abs().max()) for p, r in bent.items()}
        product = geodesic(whole, 0.3).dense() @ geodesic(whole, 0.45).dense() - geodesic(whole, 0.75).dense()
        half = geodesic(whole, 0.5).dense()
        group, root = float(product.abs().max()), float((half @ half - dense).abs().max())
        rows.append({"m": m, "b": b, "std": std, **residual, "R(a)R(b)": group, "R(1/2)^2": root})
        print(
            f"{m:2} {b:3} {std:5} " + " ".join(f"{r:10.1e}" for r in residual.values()) + f" {group:9.1e} {root:9.1e}"
        )
    return rows


def cost(n: int) -> list[dict[str, object]]:
    """Measure what a layer of n features costs on each path: found and bent to four alphas, and folded."""
    rows: list[dict[str, object]] = []
    tile = torch.randn((1 << 17) // n, n, dtype=torch.float64)
    print(f"\n{n} features, one layer: seconds to build the rotations of 1 and of 4 alphas; ns per weight to fold")
    print(f"{'m':>2} {'b':>3} {'coupled':>7} {'path':>11} {'1 alpha':>8} {'4 alphas':>8} {'fold':>6}")

    for m, b in ((1, 8), (2, 8), (3, 8), (4, 8), (4, 32)):
        # The linear path mixes folded weights and needs no rotation but R.
        for path in (p for p in InterpolationPath if p is not InterpolationPath.LINEAR):
            fresh = [random_rotation(n, m, b, 0.02) for _ in range(2)]
            one = seconds(lambda f=fresh[0], p=path: interpolate_rotation(f, ALPHA, p).fused(16))  # type: ignore[misc]
            four = seconds(
                lambda f=fresh[1], p=path: [interpolate_rotation(f, a, p).fused(16) for a in (0.2, 0.4, 0.6, 0.8)]  # type: ignore[misc]
            )
            bent = interpolate_rotation(fresh[0], ALPHA, path).fused(16)
            bent.rotate_columns(tile)
            fold = min(seconds(lambda r=bent: r.rotate_columns(tile)) for _ in range(5)) / tile.numel() * 1e9  # type: ignore[misc]
            group = b << (m - 1)
            rows.append({"m": m, "b": b, "coupled": group, "path": path, "one": one, "four": four, "fold": fold})
            print(f"{m:2} {b:3} {group:7} {path:>11} {one:8.3f} {four:8.3f} {fold:6.1f}", flush=True)
    return rows


def decompositions() -> list[dict[str, object]]:
    """Measure how fast rotations are taken apart: by the Hermitian form of their generator, and by the Schur form."""
    rows: list[dict[str, object]] = []
    print("\ntaking one group of g features apart, microseconds")
    print(f"{'g':>4} {'Hermitian':>10} {'real Schur':>10}")
    for g in (4, 8, 16, 32, 64, 128, 256):
        count = max(2, 4096 // g)
        s = skew(torch.randn(count, g, g, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1)
        q = [m.numpy() for m in cayley(s)]
        hermitian = seconds(lambda s=s: Spectrum.of_generator(s)) / count * 1e6  # type: ignore[misc]
        by_schur = seconds(lambda q=q: [schur(m) for m in q]) / count * 1e6  # type: ignore[misc]
        rows.append({"g": g, "hermitian": hermitian, "schur": by_schur})
        print(f"{g:4} {hermitian:10.0f} {by_schur:10.0f}", flush=True)
    return rows


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    mpmath.mp.dps = 50
    figures = {
        "precision": precision(),
        "properties": properties(),
        "decompositions": decompositions(),
        "cost": cost(args.features),
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
