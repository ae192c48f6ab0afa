"""The general alpha of the Triton kernels: steps of the refinement, special function units, an alpha per head."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from bounds import check_against_reference  # noqa: E402

from hf_sparse_attention.kernels import entmax_attention  # noqa: E402
from hf_sparse_attention.kernels.configurations import configured  # noqa: E402
from hf_sparse_attention.kernels.refine import power_step  # noqa: E402
from hf_sparse_attention.kernels.tiles import weights_and_curvature  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
KEYS = 1024

# NumPy, which the interpreter computes with, warns where 0 and -inf meet arithmetic; the GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def randn(*shape, seed, dtype=HALF):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@triton.jit
def _step_kernel(x_ptr, tau_ptr, step_ptr, left_ptr, exponent, KEYS: tl.constexpr, ALPHA_KIND: tl.constexpr):
    rows = tl.arange(0, 64)
    x = tl.load(x_ptr + rows[:, None] * KEYS + tl.arange(0, KEYS)[None, :])
    tau = tl.load(tau_ptr + rows)
    p, u, w = weights_and_curvature(x, tau[:, None], exponent, ALPHA_KIND=ALPHA_KIND)
    step, left = power_step(tl.sum(p, 1), tl.sum(u, 1), tl.sum(w, 1), exponent)
    tl.store(step_ptr + rows, step)
    tl.store(left_ptr + rows, left)


def total(x, tau, exponent):
    """The sum of p at tau, float64."""
    return (x.double() - tau.double()[:, None]).clamp(min=0).pow(exponent).sum(1)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.333, 1.5, 1.75])
def test_a_step_of_the_refinement_leaves_what_it_says(alpha, kind):
    exponent = 1 / (alpha - 1)
    for scale, seed in ((0.3, 0), (1.0, 1), (3.0, 2)):
        x = randn(64, KEYS, seed=seed, dtype=torch.float32) * scale * (alpha - 1)
        # Equal keys, and one that holds all.
        x[0], x[1, 7] = 0.0, 30.0
        tau = x.amax(1) - 1
        for _ in range(12):
            # As in the dense pass: from the left, by Newton on the sums over the maxima of 64 classes of keys.
            excess = (x.view(64, -1, 64).amax(1) - tau[:, None]).clamp(min=0)
            sums, slopes = excess.pow(exponent).sum(1), excess.pow(exponent - 1).where(excess > 0, 0.0).sum(1)
            tau = tau + torch.where(sums > 1, (sums - sums ** (1 - 1 / exponent)) / slopes.clamp(min=1e-30), 0.0)
        step, left = torch.empty_like(tau), torch.empty_like(tau)
        for turn in range(3):
            before = (total(x, tau, exponent) - 1).abs()
            _step_kernel[(1,)](x, tau, step, left, exponent, KEYS=KEYS, ALPHA_KIND=kind)
            tau = tau + step
            after = (total(x, tau, exponent) - 1).abs()
            # The factor is an estimate: half precision needs its order of magnitude, which the output corrects.
            assert (after <= 4 * left + 2e-5).all(), (scale, turn, (after / left).max())
            assert (after <= 0.5 * before + 2e-5).all(), (scale, turn)
        assert (after < (2e-5 if alpha <= 1.5 else 2e-3)).all()


@pytest.mark.parametrize("alphas", [(1.5, 3.0), (1.333, 2.0), (1.25, 2.5)])
def test_an_alpha_per_head_below_and_above_two(alphas):
    """Heads above 2 take another way through every kernel, and which ones is known on the device only."""
    tensors = [randn(1, heads, 150, 32, seed=seed) for seed, heads in enumerate((2, 1, 1, 2))]
    for order in (alphas, alphas[::-1]):
        alpha = torch.tensor(order, device=DEVICE, requires_grad=True)
        with configured(short_keys=0):
            check_against_reference(entmax_attention, *tensors, alpha=alpha)


@pytest.mark.parametrize("short_keys", [256, 0])
def test_the_gradient_of_alpha_of_nearly_equal_weights(short_keys):
    """It is a small part of sums that cancel there: summed one by one they left 6 to 19 times the error."""
    # As many heads as make the root mean square of their errors more than a draw.
    alpha = torch.full((8,), 1.1, device=DEVICE, requires_grad=True)
    for seed in range(3):
        query, key, value, gradient = (
            randn(1, heads, 31, 8, seed=4 * seed + place, dtype=torch.float32)
            for place, heads in enumerate((8, 1, 1, 8))
        )
        with configured(short_keys=short_keys):
            check_against_reference(entmax_attention, 0.2 * query, key, value, gradient, alpha=alpha, causal=False)


@pytest.mark.parametrize("alpha", [1.5, 1.333])
def test_the_mean_of_the_values_is_as_near_as_the_output(alpha):
    """The output is corrected for what the refinement leaves, the mean that the query gradient reads is not."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 327, 16, generator=generator).to(DEVICE, HALF) for heads in (2, 1, 1, 2)]
    ratios = check_against_reference(entmax_attention, *tensors, alpha=alpha)
    assert ratios["dquery"] < 2


def test_half_precision_takes_logarithms_from_the_special_function_unit(tmp_path):
    program = """
        import re
        import triton, triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from hf_sparse_attention.kernels.tiles import weights, weights_and_curvature

        @triton.jit
        def kernel(pointer, exponent, ALPHA_KIND: tl.constexpr):
            place = pointer + tl.arange(0, 32)
            p, u, w = weights_and_curvature(tl.load(place), 0.5, exponent, ALPHA_KIND=ALPHA_KIND)
            tl.store(place, p + u * w)

        def compiled(kind, target):
            types = {"pointer": "*fp32", "exponent": "fp32", "ALPHA_KIND": "constexpr"}
            return triton.compile(ASTSource(kernel, types, {(2,): kind}, {}), target=target).asm

        for kind in (0, 1, 2):
            text = compiled(kind, GPUTarget("cuda", 90, 32))["ptx"]
            print(kind, len(re.findall(r"lg2.approx", text)), len(re.findall(r"fma.rn", text)))
    """
    file = tmp_path / "compiled.py"
    file.write_text(textwrap.dedent(program))
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(file)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = {int(kind): (int(units), int(sums)) for kind, units, sums in map(str.split, finished.stdout.splitlines())}
    # The exact logarithm is a polynomial of ten terms.
    assert found[0][0] == 0 and found[0][1] > 9
    for kind in (1, 2):
        assert found[kind][0] == 1 and found[kind][1] < 4


@pytest.mark.parametrize("short_keys", [256, pytest.param(0, marks=pytest.mark.slow)])
def test_tau_of_one_key_does_not_multiply_the_rounding_of_its_weight(short_keys):
    """Its slope is 1 / (alpha - 1): a sum of weights that is off by its last digit moved tau by three of its own."""
    query, key, value = (randn(60, 1, 1, 8, seed=seed, dtype=torch.float16) for seed in range(3))
    with configured(short_keys=short_keys):
        ratios = check_against_reference(entmax_attention, 0.2 * query, key, value, alpha=4.0)
    assert ratios["out"] == 0


@pytest.mark.skipif(CUDA, reason="a GPU has no need to imitate one")
def test_tau_where_a_tensor_core_cuts_off(monkeypatch):
    """Sums of eight tf32 products that lose, always towards zero, what float32 has no digits for, as on an H200."""
    import numpy
    from triton.runtime import interpreter

    def truncated(x):
        near = x.astype(numpy.float32)
        return numpy.where(abs(near.astype(numpy.float64)) > abs(x), numpy.nextafter(near, numpy.float32(0)), near)

    def create_dot(self, a, b, d, *_):
        first, second = (tensor.data.astype(numpy.float64) for tensor in (a, b))
        total = d.data.astype(numpy.float32)
        for channel in range(0, first.shape[1], 8):
            part = slice(channel, channel + 8)
            total = truncated(total + first[:, part] @ second[part])
        return interpreter.TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    query, key, value = (randn(1, 1, length, 128, seed=length, dtype=torch.float16) for length in (64, 400, 401))
    with configured(short_keys=0):
        check_against_reference(entmax_attention, query, key, value[:, :, 1:], alpha=4.0, causal=False)
