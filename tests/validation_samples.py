"""Validations as they come in life, made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

from numpy.random import Generator, default_rng

from boft_export.errors import Level
from boft_export.validation.model import Check, FunctionalFacts, LayerFacts, Outcome, TensorFacts, Validation

KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
HOSTILE = "<script>alert(1)</script>&amp;\"'|`$x_1$\u202e\x1b[31m\x00\ud800.\r\n::error::]]>*_@you #1"


def layer(module: str, size: int, turn: float, chance: Generator, *, expected: float = 0.0) -> LayerFacts:
    residual = expected + 4.4e-16 * chance.uniform(0.8, 2.5)
    angles = tuple(turn * 2 * (i / 20) ** 0.8 for i in range(21))
    return LayerFacts(
        module=module, adapter=0, num_features=size, num_factors=2, block_size=8, group_size=16,
        residual=residual, residual_norm=residual * 40, expected_residual=expected, determinant=1.0,
        smallest_singular_value=math.sqrt(1 - residual), largest_singular_value=math.sqrt(1 + residual),
        angles=angles, smallest_scale=0.93, largest_scale=1.08,
    )  # fmt: skip


def passed(facts: LayerFacts) -> list[Check]:
    limit = 1e-13
    return [
        Check(
            "orthogonality", facts.module, Outcome.PASS, "|R^T R - I| is 4.4e-16",
            measured={"deviation": abs(facts.residual - facts.expected_residual), "determinant": facts.determinant},
            limits={"deviation": limit},
        ),
        Check(
            "scale", facts.module, Outcome.PASS, "output scales are 0.93 to 1.08",
            measured={"smallest_scale": 0.93, "largest_scale": 1.08, "zeros": 0}, limits={"smallest_scale": 0.1},
        ),
    ]  # fmt: skip


def healthy(depth: int = 32, *, expected: float = 0.0) -> Validation:
    """A merge of a model as large as Llama 2 7B."""
    chance = default_rng(0)
    layers, tensors, checks = (
        [],
        [TensorFacts("model.embed_tokens.weight", "copy", "bfloat16", (32000, 4096), 0, 0)],
        [],
    )
    for i in range(depth):
        for j, (kind, shape) in enumerate(KINDS.items()):
            module = f"model.layers.{i}.{kind}"
            turn = 0.05 + 0.01 * j + 0.002 * abs(i - depth / 2) + chance.uniform(0, 0.01)
            layers.append(layer(module, shape[1], turn, chance, expected=expected * chance.uniform(0.5, 1)))
            tensors.append(TensorFacts(f"{module}.weight", "fold", "bfloat16", shape, 0, 0, turn, 0.0017 / turn))
            checks += passed(layers[-1])
            checks.append(
                Check(
                    "replay", f"{module}.weight", Outcome.PASS, "all elements are correctly rounded",
                    measured={"wrong": 0, "largest_ulp": 0}, limits={"wrong": 0},
                )
            )  # fmt: skip
        tensors.append(TensorFacts(f"model.layers.{i}.input_layernorm.weight", "copy", "bfloat16", (4096,), 0, 0))
    checks += [
        Check("untouched", "", Outcome.PASS, f"{depth + 1} tensors are the base's, byte for byte"),
        Check("config", "config.json", Outcome.PASS, "is the base's"),
        Check(
            "functional", "", Outcome.PASS, "logits differ by no more than rounding",
            measured={"largest_difference": 0.011, "kl_divergence": 2e-6, "top1_agreement": 1.0},
            limits={"largest_difference": 0.048, "top1_agreement": 0.99},
        ),
    ]  # fmt: skip
    functional = FunctionalFacts("hooks", "random", 16, "logits", 0.011, 0.012, 3.4, 2e-6, 1.0, 0.999998)
    return Validation(
        ("org/boft-math",), "meta-llama/Llama-2-7b-hf", "out/llama-2-7b-math", tuple(checks), tuple(layers),
        tuple(tensors), functional,
    )  # fmt: skip


def sabotaged() -> Validation:
    """A small merge in which one thing after the other went wrong."""
    good = healthy(2)
    chance = default_rng(1)
    bad = replace(
        layer("model.layers.1.mlp.up_proj", 4096, 0.1, chance), residual=0.031, smallest_singular_value=0.98,
        largest_singular_value=1.021, determinant=-1.0,
    )  # fmt: skip
    weight = "model.layers.{}.self_attn.{}.weight"

    def fail(check: str, subject: str, finding: str, message: str, hint: str | None = None, **figures: float) -> Check:
        limits = dict.fromkeys(list(figures)[:1], 1e-13 if check == "orthogonality" else 0)
        return Check(check, subject, Outcome.FAIL, message, Level.ERROR, finding, hint, figures, limits)

    wrong = {
        weight.format(i, kind): Check(
            "replay", weight.format(i, kind), Outcome.FAIL,
            f"16,7{i}4,211 of 16,777,216 elements are wrong; with R instead of R^T, all are right", Level.ERROR,
            "transposed-rotation", "Merge with W R^T: R turns the input features.",
            {"wrong": 16754211, "largest_ulp": 31987}, {"wrong": 0},
        )
        for i in range(2)
        for kind in ("q_proj", "k_proj", "v_proj")
    }  # fmt: skip
    checks = [wrong.get(c.subject, c) if c.check == "replay" else c for c in good.checks]
    checks = [c for c in checks if not (c.check == "orthogonality" and c.subject == bad.module)]
    checks += [
        fail(
            "orthogonality", bad.module, "not-orthogonal", "|R^T R - I| is 4.2e-02, expected was 0 to within 1.0e-13",
            deviation=0.042, determinant=-1.0,
        ),
        fail(
            "untouched", "model.embed_tokens.weight", "flipped-bit", "1 of 131,072,000 elements differs: element "
            "(17, 2043) is -3.39e+38, expected 0.0124", "Copy model-00001-of-00002.safetensors from the base again.",
            wrong=1,
        ),
        fail(
            "files", "model-00002-of-00002.safetensors", "damaged-file",
            "is 4,912,384 bytes long, its header promises 4,999,819,336", "Download or merge it again.",
        ),
        fail("functional", "", "not-applied", "the model's logits are the base's", largest_difference=3.4),
        Check(
            "invariant", "lm_head.weight", Outcome.INCONCLUSIVE, "has fewer rows than columns and its dtype's rounding "
            "is as large as the change", hint="Give --adapter for an exact replay.",
        ),
        Check(
            "scale", "model.layers.0.mlp.down_proj", Outcome.FAIL, "2 output scales are 0: these outputs vanish",
            Level.WARNING, "zero-scale", None, {"zeros": 2},
        ),
    ]  # fmt: skip
    names = {t.name: t for t in good.tensors}
    for name in wrong:
        names[name] = replace(names[name], wrong=16754211, largest_ulp=31987)
    names["model.embed_tokens.weight"] = replace(names["model.embed_tokens.weight"], wrong=1, largest_ulp=32640)
    layers = tuple(bad if x.module == bad.module else x for x in good.layers)
    return replace(good, checks=tuple(checks), layers=layers, tensors=tuple(names.values()))


def adapter_only() -> Validation:
    """A Neumann series, judged by itself."""
    found = healthy(4, expected=3e-4)
    checks = tuple(c for c in found.checks if c.check in {"orthogonality", "scale"})
    return replace(found, base=None, merged=None, checks=checks, tensors=(), functional=None)


def no_adapter() -> Validation:
    """A merge by another tool, judged by its Gram matrices."""
    chance = default_rng(2)
    tensors, checks = [], []
    for t in healthy(4).tensors:
        noise = 1e-4 * chance.uniform(0.8, 1.2)
        told = replace(t, wrong=None, largest_ulp=None, relative_change=None, rounding_loss=None)
        if t.action == "copy":
            tensors.append(replace(told, action="identical"))
            continue
        residual = noise * chance.uniform(0.5, 1.4) if "layers.2.mlp.up" not in t.name else 0.2
        tensors.append(
            replace(told, action="rotation" if residual < 0.1 else "replacement", residual=residual, noise=noise)
        )
        outcome = Outcome.PASS if residual < 0.1 else Outcome.FAIL
        checks.append(
            Check(
                "invariant", t.name, outcome, f"its Gram matrix is {residual:.1e} from a rotated base's",
                finding=None if outcome is Outcome.PASS else "not-a-rotation",
                measured={"residual": residual, "noise": noise}, limits={"residual": 6 * noise},
            )
        )  # fmt: skip
    return Validation((), "base", "merged", tuple(checks), (), tuple(tensors))


def undecided() -> Validation:
    return replace(
        adapter_only(),
        checks=(*adapter_only().checks, Check("files", "x.bin", Outcome.INCONCLUSIVE, "has no hash to compare with")),
    )


def hostile() -> Validation:
    """Names and messages with all that some format takes for its own."""
    found = sabotaged()
    checks = tuple(
        replace(
            c, subject=c.subject + HOSTILE, message=c.message + HOSTILE, hint=HOSTILE, check=c.check + HOSTILE,
            finding=None if c.finding is None else c.finding + HOSTILE,
            measured={k + HOSTILE: v for k, v in c.measured.items()},
            limits={k + HOSTILE: v for k, v in c.limits.items()},
        )
        for c in found.checks
    )  # fmt: skip
    layers = tuple(replace(x, module=x.module + HOSTILE) for x in found.layers)
    tensors = tuple(replace(t, name=t.name + HOSTILE, action=HOSTILE, dtype=HOSTILE) for t in found.tensors)
    functional = FunctionalFacts(HOSTILE, HOSTILE, 1, HOSTILE, math.nan, math.inf, -math.inf, None, None, 1.0)
    return Validation((HOSTILE, HOSTILE), HOSTILE, HOSTILE, checks, layers, tensors, functional)


def broken() -> Validation:
    """Nothing of it is a number."""
    facts = layer("a", 8, 0.1, default_rng(0))
    nan = {k: math.nan for k, v in vars(facts).items() if isinstance(v, float)}
    facts = replace(facts, **nan, angles=(math.nan,) * 21)
    check = Check(
        "orthogonality", "a", Outcome.FAIL, "is not finite", measured={"deviation": math.nan},
        limits={"deviation": 1e-13},
    )  # fmt: skip
    tensor = TensorFacts("a.weight", "fold", "float16", (), 3, None, math.inf, math.nan, math.nan, math.nan)
    return Validation(("adapter",), "base", "merged", (check,), (facts,), (tensor,), None)


VALIDATIONS = {
    "healthy": healthy(),
    "sabotaged": sabotaged(),
    "adapter only": adapter_only(),
    "no adapter": no_adapter(),
    "undecided": undecided(),
    "undecided fails": replace(undecided(), fail_on=frozenset({"error", "inconclusive"})),
    "warned": replace(sabotaged(), checks=tuple(c for c in sabotaged().checks if c.level is Level.WARNING)),
    "warnings fail": replace(sabotaged(), fail_on=frozenset({"error", "warning"})),
    "functional only": replace(healthy(1), layers=(), tensors=(), checks=healthy(1).checks[-1:]),
    "hostile": hostile(),
    "broken": broken(),
    "empty": Validation(("adapter",), None, None, ()),
    "nothing at all": Validation((), None, None, ()),
}
