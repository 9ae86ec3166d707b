"""Every kind of module through a real merge: against LyCORIS' and PEFT's own layers, and float64 written out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import BOFTConfig, OFTConfig, get_peft_model
from torch import nn

import loratools as lt
from loratools.adapter import Adapter, AdapterConfig, Module
from loratools.computing import blocks
from loratools.deltas.algebra import add, factored, norm, singular_values
from loratools.deltas.base import Delta, Fitting, Span
from loratools.deltas.boft import butterfly
from loratools.deltas.dora import EPSILON, WeightDecomposed
from loratools.deltas.full import Dense
from loratools.deltas.glora import Generalized, arrangement
from loratools.deltas.hadamard import expanded
from loratools.deltas.kronecker import Kronecker
from loratools.deltas.likeness import compare
from loratools.deltas.lowrank import LowRank, whole
from loratools.deltas.oft import Rotated, Stage, cayley, constrained, neumann, projected, skew, unpacked
from loratools.errors import InputError, LoratoolsError, Mismatch, ShapeMismatch, Unsupported
from loratools.matrices import bias_delta, matrices, require_delta
from loratools.planning import Contribution, Output, plan_steps
from loratools.targets import Target, Term
from loratools.tensors.base import TensorRef
from loratools.tensors.memory import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratools.dtypes import Array

seeds = st.integers(0, 2**32 - 1)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "conv1d": lambda: nn.Conv1d(6, 16, 3),
    "conv2d": lambda: nn.Conv2d(6, 16, (3, 2)),
    "conv3d": lambda: nn.Conv3d(6, 16, (1, 2, 2)),
}
# What LyCORIS calls a tensor, and its role here.
ROLES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "dora_scale": "magnitude",
    "hada_w1_a": "first_a", "hada_w1_b": "first_b", "hada_w2_a": "second_a", "hada_w2_b": "second_b",
    "hada_t1": "first_core", "hada_t2": "second_core", "lokr_w1": "left", "lokr_w1_a": "left_a",
    "lokr_w1_b": "left_b", "lokr_w2": "right", "lokr_w2_a": "right_a", "lokr_w2_b": "right_b", "lokr_t2": "right_core",
    "a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2", "oft_blocks": "blocks",
    "rescale": "rescale", "w_norm": "diff", "b_norm": "diff_bias", "alpha": "alpha",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def module(
    kind: str, arrays: dict[str, Any], shape: tuple[int, ...], scaling: float | None = None, **options: Any
) -> Module:
    source = MemorySource({f"fc.{role}": values for role, values in arrays.items()})
    refs = {role: TensorRef(source, f"fc.{role}") for role in arrays}
    return Module(kind, refs, None, None, scaling, shape, options)


def adapter(made: Module) -> Adapter:
    return Adapter("made", "kohya", {"fc": made}, AdapterConfig(), {}, {})


def merged(base: dict[str, Any], made: Module, **arguments: Any) -> dict[str, Any]:
    return dict(lt.merge(base, adapter(made), **arguments).state_dict)


def applied(layer: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Array:
    """The weight that a layer's forward stands for, in float64, from its answer to one input at a time."""
    kernel = getattr(layer, "kernel_size", ())
    if not kernel:
        return (
            (forward(torch.eye(layer.in_features)) - forward(torch.zeros(1, layer.in_features)))
            .T.double()
            .numpy()
        )
    count = layer.in_channels
    inputs = torch.zeros(count, count, *(2 * size - 1 for size in kernel))
    for channel in range(count):
        inputs[(channel, channel, *(size - 1 for size in kernel))] = 1
    found = forward(inputs) - forward(torch.zeros_like(inputs[:1]))
    return found.transpose(0, 1).flip(tuple(range(2, found.dim()))).double().numpy()


def distance(found: Any, wanted: Array) -> float:
    found = found.double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def randomised(layer: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer.eval()


def arrays_of(lycoris: nn.Module) -> dict[str, Array]:
    return {ROLES[name]: value.detach().numpy() for name, value in lycoris.state_dict().items()}


@torch.no_grad()
def against_lycoris(layer: Any, lycoris: Any, made: Module) -> None:
    """A merge of a module, and of the file that LyCORIS would save it in."""
    base = {name: value.detach().clone() for name, value in layer.named_parameters(prefix="fc")}
    wanted = applied(layer, lycoris)
    assert distance(merged(base, made)["fc.weight"], wanted) < 1e-6
    if isinstance(lycoris, FullModule):
        saved = {"diff": lycoris.weight, "diff_b": lycoris.bias}  # it keeps them as weights until it is saved
    else:
        saved = lycoris.state_dict()
    read = lt.load({f"lora_unet_fc.{name}": value.detach() for name, value in saved.items()})
    assert [module.kind for module in read.modules.values()] == [made.kind]
    assert distance(lt.merge(base, read).state_dict["fc.weight"], wanted) < 1e-6


def frozen(name: str, seed: int = 1) -> Any:
    layer = randomised(LAYERS[name](), seed)
    return layer.requires_grad_(False)


# --- LyCORIS' own layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(
    ("kind", "owner"), [("lora", LoConModule), ("loha", LohaModule), ("lokr", LokrModule)]
)
def test_factors_are_what_lycoris_applies(
    name: str, tucker: bool, axis: int | None, kind: str, owner: Any
) -> None:
    layer = frozen(name)
    decomposed = {"weight_decompose": axis is not None, "wd_on_out": axis != 1}
    lycoris = randomised(owner("fc", layer, 1.0, 2, 3.0, use_tucker=tucker, **decomposed))
    arrays = arrays_of(lycoris)
    assert ("mid" in arrays or "first_core" in arrays) == (tucker and name != "linear" and kind != "lokr")
    options = {} if axis is None else {"magnitude_axis": axis}
    kind = "dora" if kind == "lora" and axis is not None else kind
    made = module(kind, arrays, tuple(layer.weight.shape), float(lycoris.scale), **options)
    assert made.is_delta == (axis is None)
    against_lycoris(layer, lycoris, made)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("build", [lambda: nn.Conv1d(64, 64, 3), lambda: nn.Conv2d(64, 64, (3, 2))])
def test_kroneckers_sides_are_multiplied_out_as_lycoris_does(tucker: bool, both: bool, build: Any) -> None:
    layer = randomised(build(), 1).requires_grad_(False)
    lycoris = randomised(LokrModule("fc", layer, 1.0, 2, 3.0, use_tucker=tucker, decompose_both=both))
    arrays = arrays_of(lycoris)
    assert ("right_core" in arrays) == tucker
    assert ("left_a" in arrays) == both
    made = module("lokr", arrays, tuple(layer.weight.shape), float(lycoris.scale))
    against_lycoris(layer, lycoris, made)


@pytest.mark.parametrize("name", LAYERS)
def test_glora_is_what_lycoris_applies(name: str) -> None:
    layer = frozen(name)
    lycoris = randomised(GLoRAModule("fc", layer, 1.0, 3, 2.0))
    arrays = arrays_of(lycoris)
    shape = tuple(layer.weight.shape)
    against_lycoris(layer, lycoris, module("glora", arrays, shape, 2 / 3))
    old = {"a1": arrays["a2"], "a2": arrays["a1"], "b1": arrays["b2"], "b2": arrays["b1"]}
    against_lycoris(layer, lycoris, module("glora", old, shape, 2 / 3))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("constraint", [0.0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(("kind", "owner"), [("oft", DiagOFTModule), ("boft", ButterflyOFTModule)])
def test_rotations_are_what_lycoris_applies(
    name: str, constraint: float, rescaled: bool, kind: str, owner: Any
) -> None:
    layer = frozen(name)
    lycoris = randomised(owner("fc", layer, 1.0, 4, constraint=constraint, rescaled=rescaled))
    arrays = arrays_of(lycoris)
    bound = constraint * 16
    assert np.linalg.norm(skew(arrays["blocks"])) > bound  # where there is one, it is felt
    against_lycoris(layer, lycoris, module(kind, arrays, (16,), constraint=bound))


def test_a_weighted_rotation_is_lycoris_multiplier() -> None:
    layer = frozen("linear")
    lycoris = randomised(DiagOFTModule("fc", layer, 0.5, 4))
    base = {"fc.weight": layer.weight.clone()}
    found = lt.merge(base, adapter(module("oft", arrays_of(lycoris), (16,))), weights=[0.5]).state_dict
    with torch.no_grad():
        assert distance(found["fc.weight"], applied(layer, lycoris)) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_relative_factors_are_what_lycoris_applies(name: str, on_input: bool) -> None:
    layer = frozen(name)
    lycoris = randomised(IA3Module("fc", layer, 1.0, train_on_input=on_input))
    scale = lycoris.weight.detach().numpy()
    made = module("ia3", {"scale": scale}, scale.shape, feedforward=on_input, relative=True)
    against_lycoris(layer, lycoris, made)
    base = {"fc.weight": layer.weight, "fc.bias": layer.bias}
    assert torch.equal(merged(base, made)["fc.bias"], layer.bias)  # LyCORIS scales the weight alone


@pytest.mark.parametrize("name", LAYERS)
def test_full_differences_are_added_with_their_bias(name: str) -> None:
    layer = frozen(name)
    lycoris = randomised(FullModule("fc", layer, 1.0))
    arrays = {"diff": lycoris.weight.detach().numpy(), "diff_bias": lycoris.bias.detach().numpy()}
    made = module("full", arrays, tuple(layer.weight.shape))
    against_lycoris(layer, lycoris, made)
    found = merged({"fc.weight": layer.weight, "fc.bias": layer.bias}, made)["fc.bias"]
    np.testing.assert_allclose(found, layer.bias.numpy() + arrays["diff_bias"], rtol=1e-6)


@pytest.mark.parametrize("layer", [nn.LayerNorm(16), nn.GroupNorm(4, 16)])
def test_norms_are_what_lycoris_applies(layer: Any) -> None:
    layer = randomised(layer, 1).requires_grad_(False)
    lycoris = randomised(NormModule("fc", layer, 1.0))
    made = module("norm", arrays_of(lycoris), (16,), 1.0)
    assert made.is_delta
    found = merged({"fc.weight": layer.weight.clone(), "fc.bias": layer.bias.clone()}, made)
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = lycoris(inputs)
        layer.load_state_dict({"weight": found["fc.weight"], "bias": found["fc.bias"]})
        torch.testing.assert_close(layer(inputs), wanted, rtol=1e-5, atol=1e-6)


# --- PEFT's own layers --------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer


@pytest.mark.parametrize("build", [lambda: nn.Linear(24, 16), lambda: nn.Conv2d(4, 16, 3)])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coft", [None, 1e-2])
def test_input_rotations_are_what_peft_merges(
    build: Any, terms: int, shared: bool, coft: float | None
) -> None:
    layer = randomised(build(), 1)
    base = {"fc.weight": layer.weight.detach().clone()}
    config = OFTConfig(
        target_modules=["fc"], oft_block_size=6, init_weights=False, block_share=shared, coft=coft is not None,
        eps=coft or 0.0, use_cayley_neumann=bool(terms), num_cayley_neumann_terms=terms,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(Toy(layer), config)
    packed = model.base_model.model.fc.oft_R["default"].weight.detach().clone().numpy()
    options: dict[str, Any] = {"neumann": terms} | ({} if coft is None else {"coft": coft})
    made = module("oftv2", {"packed": packed}, (packed.shape[0] * 6,), **options)
    wanted = model.merge_and_unload().fc.weight.detach().double().numpy()
    assert distance(merged(base, made)["fc.weight"], wanted) < 1e-6
    if terms != 1 and coft is None:
        assert distance(base["fc.weight"], wanted) > 1e-2


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_input_butterflies_are_what_peft_merges(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.boft import layer as boft

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)  # which it would try to compile
    layer = randomised(nn.Linear(32, 16), 1)
    base = {"fc.weight": layer.weight.detach().clone()}
    torch.manual_seed(0)
    model = get_peft_model(
        Toy(layer), BOFTConfig(target_modules=["fc"], boft_block_size=4, init_weights=False)
    )
    owner = model.base_model.model.fc
    generator = torch.Generator().manual_seed(3)
    blocks = 0.3 * torch.randn(stages, 8, 4, 4, generator=generator)
    factors = owner.boft_s["default"].detach()
    if stages == 1:
        owner.boft_R["default"].data.copy_(blocks)
        wanted = model.merge_and_unload().fc.weight.detach().double().numpy()
    else:  # of several stages PEFT multiplies the matrices with its CUDA extension only: they are its own here too
        rotation = torch.eye(32)
        for i in range(stages):
            order = owner.block_butterfly_perm(32, 8 // 2**i, 2, stages - 1)
            place = owner.perm2mat(order)
            rotation = place @ torch.block_diag(*owner.cayley_batch(blocks[i])) @ place.T @ rotation
        wanted = ((rotation @ base["fc.weight"].T).T * factors).double().numpy()
    arrays = {"blocks": blocks.numpy(), "rescale": factors.numpy()}
    made = module("boft", arrays, (32,), on_input=True)
    assert distance(merged(base, made)["fc.weight"], wanted) < 1e-6
    assert distance(base["fc.weight"], wanted) > 1e-2


# --- float64, written out -----------------------------------------------------------------------------------------


def blocks_of_rows(update: Any, weight: Array, block: int) -> Array:
    """An update of a copy of a weight: some rows at a time where it can be, else all at once."""
    if isinstance(update, Fitting):
        update = update.fitted(weight.shape)
    assert update.shape == weight.shape
    step = block if update.rowwise else len(weight)
    parts = [update.apply(weight[i : i + step].copy(), i) for i in range(0, len(weight), step)]
    return np.concatenate(parts)


def rotation(blocks: Array, sign: int = 1, half: float = 1.0) -> Array:
    """(I + Q)(I - Q)⁻¹ of every block along one diagonal, float64."""
    count, size = blocks.shape[:2]
    found = np.zeros((count * size, count * size))
    for i, block in enumerate(blocks.astype(np.float64)):
        q = sign * half * (block - block.T)
        at = slice(i * size, (i + 1) * size)
        found[at, at] = (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
    return found


@given(
    count=st.integers(1, 5), size=st.integers(1, 6), others=st.integers(1, 20), block=st.integers(1, 9), seed=seeds,
    transposed=st.booleans(), rescaled=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_output_rotations_are_a_product_with_the_weight(
    count: int, size: int, others: int, block: int, seed: int, transposed: bool, rescaled: bool
) -> None:
    rng = np.random.default_rng(seed)
    blocks, weight = normal(rng, count, size, size), normal(rng, count * size, others)
    factors = normal(rng, count * size) if rescaled else None
    wanted = rotation(blocks).T @ weight
    if factors is not None:
        wanted = factors[:, None] * wanted
    update: Any = Rotated((Stage(cayley(-skew(blocks))),), rescale=factors)
    # A shared block would be of as many features as the weight has: of one block it says the same.
    found = (
        blocks_of_rows(update.transposed(), weight.T.copy(), block).T
        if transposed
        else blocks_of_rows(update, weight, block)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * (1 + np.abs(wanted).max()))


@given(
    count=st.integers(1, 5), size=st.integers(2, 6), others=st.integers(1, 20), block=st.integers(1, 9), seed=seeds,
    transposed=st.booleans(), shared=st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_input_rotations_are_a_product_with_the_weight(
    count: int, size: int, others: int, block: int, seed: int, transposed: bool, shared: bool
) -> None:
    rng = np.random.default_rng(seed)
    packed = normal(rng, 1 if shared else count, size * (size - 1) // 2)
    weight = normal(rng, others, count * size)
    triangles = np.zeros((len(packed), size, size))
    triangles[:, *np.triu_indices(size, 1)] = packed
    wanted = weight @ rotation(np.repeat(triangles, count, 0) if shared else triangles, -1).T
    made = module("oft", {"packed": packed}, (packed.shape[0] * size,), neumann=0)
    update = made.load()
    if transposed:
        update, weight = update.transposed(), weight.T.copy()
    assert made.rowwise(transposed=transposed) == update.rowwise == (not transposed)
    found = blocks_of_rows(update, weight, block)
    wanted = wanted.T if transposed else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * (1 + np.abs(wanted).max()))


@given(
    stages=st.integers(1, 3),
    runs=st.integers(1, 3),
    half=st.integers(1, 3),
    others=st.integers(1, 9),
    seed=seeds,
)
@settings(deadline=None)
def test_butterflies_mix_pairs_of_rows_further_and_further_apart(
    stages: int, runs: int, half: int, others: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count, size = runs * 2 ** (stages - 1), 2 * half
    blocks, weight = 0.3 * normal(rng, stages, count, size, size), normal(rng, count * size, others)
    wanted = weight.astype(np.float64)
    for stage in range(stages):
        apart = 2**stage * half  # rows that lie so far from each other share a block
        left = [row for row in range(count * size) if row % (2 * apart) < apart]
        order = [row + shift for row in left for shift in (0, apart)]
        turned = rotation(blocks[stage]) @ wanted[order]
        wanted = wanted.copy()
        wanted[order] = turned
    found = blocks_of_rows(butterfly(blocks), weight, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * (1 + np.abs(wanted).max()))


@given(
    out=st.integers(1, 9), channels=st.integers(1, 6), kernel=st.integers(1, 5), rank=st.integers(1, 4), seed=seeds,
    block=st.integers(1, 9),
)  # fmt: skip
@settings(deadline=None)
def test_glora_multiplies_input_channels_at_each_place_of_the_kernel(
    out: int, channels: int, kernel: int, rank: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    left, right = normal(rng, channels, rank), normal(rng, rank, channels)
    up, down = normal(rng, out, rank), normal(rng, rank, channels * kernel)
    weight = normal(rng, out, channels, kernel)
    wide = weight.astype(np.float64)
    change = np.einsum("oik,ir,rj->ojk", wide, left, right).reshape(out, -1) + up.astype(np.float64) @ down
    wanted = wide.reshape(out, -1) + 0.7 * change
    update = Generalized(LowRank(up, down, 0.7), left, right, 0.7)
    np.testing.assert_allclose(
        blocks_of_rows(update, weight.reshape(out, -1), block), wanted, rtol=1e-4, atol=1e-4
    )
    if kernel == 1:
        turned = update.transposed()
        assert not turned.rowwise
        found = blocks_of_rows(turned, weight.reshape(out, -1).T.copy(), block)
        np.testing.assert_allclose(found, wanted.T, rtol=1e-4, atol=1e-4)
        assert turned.transposed().rowwise
    else:
        with pytest.raises(ShapeMismatch):
            update.transposed()


@given(
    out=st.integers(1, 9), channels=st.integers(1, 6), kernel=st.integers(1, 5), seed=seeds, by_input=st.booleans(),
    transposed=st.booleans(), block=st.integers(1, 9),
)  # fmt: skip
@settings(deadline=None)
def test_magnitudes_are_the_norms_of_outputs_or_of_channels(
    out: int, channels: int, kernel: int, seed: int, by_input: bool, transposed: bool, block: int
) -> None:
    kernel = 1 if transposed else kernel
    rng = np.random.default_rng(seed)
    up, down = normal(rng, out, 2), normal(rng, 2, channels * kernel)
    weight, magnitude = normal(rng, out, channels * kernel), normal(rng, channels if by_input else out)
    wide = (weight + 0.5 * up.astype(np.float64) @ down).reshape(out, channels, kernel)
    axes = (0, 2) if by_input else (1, 2)
    norm = np.sqrt((wide**2).sum(axis=axes, keepdims=True)) + EPSILON
    wanted = (wide / norm * magnitude.reshape((1, -1, 1) if by_input else (-1, 1, 1))).reshape(out, -1)
    update: Any = WeightDecomposed(LowRank(up, down, 0.5), magnitude, by_input, EPSILON)
    assert update.rowwise == (not by_input)
    if transposed:
        update, weight, wanted = update.transposed(), weight.T.copy(), wanted.T
        assert update.rowwise == by_input
    found = blocks_of_rows(update, weight, block)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@given(
    out=st.integers(1, 9), into=st.integers(1, 9), kernel=st.lists(st.integers(1, 3), max_size=3), seed=seeds
)
@settings(deadline=None)
def test_a_core_expands_into_the_kernel_of_the_lower_factor(
    out: int, into: int, kernel: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    core, up, down = normal(rng, 3, 2, *kernel), normal(rng, out, 3), normal(rng, 2, into)
    wanted = np.einsum("pq...,op,qi->oi...", core.astype(np.float64), up, down).reshape(out, -1)
    np.testing.assert_allclose(up @ expanded(core, down), wanted, rtol=1e-4, atol=1e-4)
    ones = [1] * len(kernel)
    arrays = {"down": down.reshape(2, into, *ones), "up": up.reshape(out, 3, *ones), "mid": core}
    made = module("lora", arrays, (out, into, *kernel), 0.5)
    (delta,) = matrices(made, "fc")
    np.testing.assert_allclose(delta.up @ delta.down, 0.5 * wanted, rtol=1e-4, atol=1e-4)


@given(a=st.integers(1, 4), b=st.integers(1, 4), into=st.integers(1, 4), seed=seeds, data=st.data())
@settings(deadline=None)
def test_some_rows_of_a_kronecker_product_stay_one(
    a: int, b: int, into: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    left, right = normal(rng, a, into), normal(rng, b, into)
    dense = 0.5 * np.kron(left.astype(np.float64), right)
    first = data.draw(st.integers(0, a * b - 1))
    last = data.draw(st.integers(first + 1, a * b))
    part = Kronecker(left, right, 0.5).part(Span(first, last), None)
    assert isinstance(part, Kronecker)
    wanted = dense[first:last]
    for found in (part.rows(0, last - first), part.transposed().rows(0, into * into).T):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    made = module("lokr", {"left": left, "right": right}, wanted.shape, 0.5, rows=(first, last))
    (delta,) = matrices(made, "fc")
    np.testing.assert_allclose(delta.up @ delta.down, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        merged({"fc.weight": np.zeros(wanted.shape, "f4")}, made)["fc.weight"], wanted, rtol=1e-5, atol=1e-6
    )
    (again,) = (part.part(Span(0, last - first, 2), Span(0, into)),)
    np.testing.assert_allclose(
        again.rows(0, len(range(0, last - first, 2))), wanted[::2, :into], rtol=1e-5, atol=1e-6
    )


def test_a_rotation_by_two_matrices_is_orthogonal() -> None:
    rotations = skew(normal(np.random.default_rng(0), 3, 40, 40))
    for change in (cayley(rotations), cayley(rotations.reshape(3, 1, 40, 40))[:, 0]):
        turned = change + np.eye(40)
        np.testing.assert_allclose(
            turned @ turned.transpose(0, 2, 1), np.broadcast_to(np.eye(40), (3, 40, 40)), atol=1e-12
        )
    small = 1e-3 * rotations
    assert np.abs(neumann(small, 30) - cayley(small)).max() < 1e-12
    assert np.abs(neumann(small, 5) - cayley(small)).max() < 1e-6


def test_a_rotation_is_held_below_its_constraint_and_left_alone_within() -> None:
    rotations = skew(normal(np.random.default_rng(0), 3, 4, 4))
    norm = float(np.linalg.norm(rotations))
    assert constrained(rotations, 0.0) is rotations
    assert constrained(rotations, norm * 1.01) is rotations
    np.testing.assert_allclose(np.linalg.norm(constrained(rotations, norm / 3)), norm / 3)
    held = projected(rotations, 0.3)
    np.testing.assert_allclose(np.linalg.norm(held, axis=(1, 2)), 0.3 / np.sqrt(3))
    np.testing.assert_array_equal(projected(0 * rotations, 0.3), 0 * rotations)


# --- element types, biases and what stands beside -----------------------------------------------------------------

EVERY = {
    "oft": (lambda rng: {"blocks": 0.2 * normal(rng, 4, 3, 3), "rescale": normal(rng, 12)}, (12,), {}),
    "oftv2": (lambda rng: {"packed": 0.2 * normal(rng, 4, 3)}, (12,), {}),
    "boft": (lambda rng: {"blocks": 0.2 * normal(rng, 2, 2, 6, 6)}, (12,), {}),
    "glora": (
        lambda rng: {
            "a1": normal(rng, 12, 2),
            "a2": normal(rng, 2, 12),
            "b1": normal(rng, 12, 2),
            "b2": normal(rng, 2, 12),
        },
        (12, 12),
        {},
    ),
    "dora": (
        lambda rng: {"up": normal(rng, 12, 2), "down": normal(rng, 2, 12), "magnitude": normal(rng, 1, 12)},
        (12, 12),
        {"magnitude_axis": 1},
    ),
    "set": (lambda rng: {"value": normal(rng, 12, 12)}, (12, 12), {}),
    "full": (lambda rng: {"diff": normal(rng, 12, 12)}, (12, 12), {}),
}


def every(kind: str) -> Module:
    build, shape, options = EVERY[kind]
    return module(
        kind, build(np.random.default_rng(5)), shape, 0.7 if kind in {"glora", "dora"} else None, **options
    )


@pytest.mark.parametrize("kind", EVERY)
def test_wide_and_narrow_bases_are_computed_wide_and_rounded_once(kind: str) -> None:
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    made = every(kind)
    wide = merged({"fc.weight": weight.double()}, made)["fc.weight"]
    single = merged({"fc.weight": weight.float()}, made)["fc.weight"]
    narrow = merged({"fc.weight": weight}, made)["fc.weight"]
    assert (wide.dtype, single.dtype, narrow.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.double(), wide, rtol=2e-6, atol=2e-6)
    assert torch.equal(narrow, single.to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["oft", "oftv2", "boft", "glora"])
def test_float64_is_exact_to_its_own_digits(kind: str) -> None:
    made = every(kind)
    weight = np.random.default_rng(0).standard_normal((12, 12))
    values = {role: ref.load().astype(np.float64) for role, ref in made.tensors.items()}
    if kind == "oft":
        wanted = values["rescale"][:, None] * (rotation(values["blocks"]).T @ weight)
    elif kind == "oftv2":
        q = np.zeros((4, 3, 3))
        q[:, *np.triu_indices(3, 1)] = values["packed"]
        q -= q.transpose(0, 2, 1)
        series = np.eye(3) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        wanted = np.concatenate([weight[:, 3 * i : 3 * i + 3] @ series[i].T for i in range(4)], axis=1)
    elif kind == "boft":
        order = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
        first = rotation(values["blocks"][0]) @ weight[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
        wanted = np.empty((12, 12))
        wanted[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]] = first
        wanted[order] = rotation(values["blocks"][1]) @ wanted[order]
    else:
        wanted = weight + 0.7 * (weight @ values["a1"] @ values["a2"] + values["b1"] @ values["b2"])
    np.testing.assert_allclose(
        merged({"fc.weight": weight}, made)["fc.weight"], wanted, rtol=1e-12, atol=1e-12
    )


def test_a_bias_of_its_own_stands_beside_factors_of_any_kind() -> None:
    rng = np.random.default_rng(0)
    factors = {"down": normal(rng, 2, 6), "up": normal(rng, 4, 2)}
    diff, up_bias, bias = normal(rng, 4), normal(rng, 4), normal(rng, 4)
    base = {"fc.weight": normal(rng, 4, 6), "fc.bias": bias}
    for arrays, kind, scaling, wanted in (
        ({**factors, "diff_bias": diff}, "lora", 0.5, diff),
        ({**factors, "up_bias": up_bias}, "lora", 0.5, 0.5 * up_bias),
        ({**factors, "up_bias": up_bias, "diff_bias": diff}, "lora", 0.5, 0.5 * up_bias + diff),
        ({**factors, "magnitude": normal(rng, 4), "diff_bias": diff}, "dora", 0.5, diff),
        ({"blocks": normal(rng, 2, 2, 2), "diff_bias": diff}, "oft", None, diff),
        ({"diff": normal(rng, 4, 6), "diff_bias": diff}, "full", 0.5, 0.5 * diff),
        ({"diff_bias": diff}, "full", 1.0, diff),
    ):
        made = module(kind, arrays, (4,) if len(arrays) == 1 or kind == "oft" else (4, 6), scaling)
        found = merged(base, made)
        np.testing.assert_allclose(found["fc.bias"], bias + wanted, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(bias_delta(made), wanted, rtol=1e-6)
        assert made.adds("bias")
        if arrays.keys() == {"diff_bias"}:
            np.testing.assert_array_equal(found["fc.weight"], base["fc.weight"])
            (none,) = matrices(made, "fc")
            assert none.up.shape == (4, 0)
    with pytest.raises(Mismatch, match="fc trains a bias, and fc has none"):
        merged({"fc.weight": base["fc.weight"]}, module("lora", {**factors, "diff_bias": diff}, (4, 6), 1.0))


def test_a_set_weight_is_the_value_whatever_was_there() -> None:
    rng = np.random.default_rng(0)
    for shape in ((4, 6), (4,), (4, 3, 2)):
        value, weight = normal(rng, *shape), normal(rng, *shape)
        made = module("set", {"value": value}, shape)
        found = lt.merge({"fc.weight": weight}, adapter(made), weights=[0.25]).state_dict["fc.weight"]
        np.testing.assert_array_equal(merged({"fc.weight": weight}, made)["fc.weight"], value)
        np.testing.assert_allclose(found, weight + 0.25 * (value - weight), rtol=1e-5, atol=1e-6)


def test_an_alpha_among_the_tensors_has_no_say() -> None:
    rng = np.random.default_rng(0)
    arrays = {"down": normal(rng, 2, 6), "up": normal(rng, 4, 2)}
    weight = normal(rng, 4, 6)
    plain, beside = (
        module("lora", {**arrays, **more}, (4, 6), 0.5)
        for more in ({}, {"alpha": np.float64(np.nan).reshape(())})
    )
    (one,), (other,) = matrices(plain, "fc"), matrices(beside, "fc")
    assert other.up.dtype == np.float32
    np.testing.assert_array_equal(one.up @ one.down, other.up @ other.down)
    found = [merged({"fc.weight": weight}, made)["fc.weight"] for made in (plain, beside)]
    np.testing.assert_array_equal(*found)


def test_a_row_of_zeros_stays_one_by_lycoris_norm() -> None:
    arrays = {"down": np.zeros((1, 3), "f4"), "up": np.zeros((2, 1), "f4"), "magnitude": np.ones(2, "f4")}
    weight = np.array([[0, 0, 0], [3, 0, 4]], np.float32)
    made = module("dora", arrays, (2, 3), 1.0, epsilon=EPSILON)
    np.testing.assert_allclose(
        merged({"fc.weight": weight}, made)["fc.weight"], [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6
    )
    with pytest.raises(LoratoolsError, match=r"fc\.weight\[0, 0\] became nan"):
        merged({"fc.weight": weight}, module("dora", arrays, (2, 3), 1.0))


def test_a_whole_side_of_pefts_1d_convolution_is_padded_in_front() -> None:
    rng = np.random.default_rng(0)
    left, right = normal(rng, 2, 3), normal(rng, 2, 2, 5)
    peft = module("lokr", {"left": left, "right": right}, (4, 6, 5), 1.0, padded_kernel=True)
    plain = module("lokr", {"left": left, "right": right}, (4, 6, 5), 1.0)
    wanted = [
        torch.kron(torch.from_numpy(one), torch.from_numpy(right)).reshape(4, 6, 5)
        for one in (left, left[:, :, None])
    ]
    base = {"fc.weight": np.zeros((4, 6, 5), "f4")}
    for made, values in zip((peft, plain), wanted, strict=True):
        np.testing.assert_array_equal(merged(base, made)["fc.weight"], values)


# --- matrices, and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (4, 6), (6, 4), (4, 3, 2)])
@pytest.mark.parametrize("kind", ["full", "norm"])
def test_a_whole_matrix_is_its_own_factor(kind: str, shape: tuple[int, ...]) -> None:
    diff = normal(np.random.default_rng(0), *shape)
    (delta,) = matrices(module(kind, {"diff": diff}, shape), "fc")
    flat = diff.reshape(shape[0], -1)
    np.testing.assert_array_equal(delta.up @ delta.down, flat)
    assert delta.up.shape[1] == min(flat.shape)
    assert np.shares_memory(delta.up if flat.shape[0] > flat.shape[1] else delta.down, diff)


def test_values_that_are_not_finite_are_named_in_a_whole_matrix() -> None:
    diff = np.ones((3, 4), np.float32)
    diff[1, 2] = np.inf
    with pytest.raises(InputError, match=r"fc: fc\.diff holds"):
        matrices(module("full", {"diff": diff}, (3, 4)), "fc")


@pytest.mark.parametrize("kind", [*(kind for kind in EVERY if kind != "full"), "loha", "ia3"])
def test_what_needs_its_base_is_refused_by_name_with_the_way_out(kind: str) -> None:
    if kind == "ia3":
        made = module("ia3", {"scale": np.ones(12, "f4")}, (12,), feedforward=False, relative=True)
    elif kind == "loha":
        arrays = {
            f"{which}_{side}": np.ones((12, 12), "f4") for which in ("first", "second") for side in "ab"
        }
        made = module("loha", {**arrays, "magnitude": np.ones(12, "f4")}, (12, 12), 1.0)
    else:
        made = every(kind)
    assert not made.is_delta
    with pytest.raises(Unsupported, match=rf"fc is {kind}") as caught:
        require_delta("fc", made)
    assert "extract a LoRA" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="cannot be subtracted"):
        lt.merge({"fc.weight": np.ones((12, 12), "f4")}, adapter(made), weights=[-1.0])


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (module("oft", {"blocks": np.ones((4, 3, 3), "f4")}, (12,)), (10, 4)),
        (module("oftv2", {"packed": np.ones((4, 3), "f4")}, (12,)), (10, 4)),
        (module("oftv2", {"packed": np.ones((1, 3), "f4")}, (3,)), (10, 4)),
        (
            module("boft", {"blocks": np.ones((2, 3, 4, 4), "f4")}, (12,)),
            (12, 4),
        ),  # 3 blocks cannot be paired
        (module("boft", {"blocks": np.ones((1, 4, 3, 3), "f4")}, (12,)), (12, 4)),  # blocks without halves
        (module("oftv2", {"packed": np.ones((4, 4), "f4")}, (12,)), (4, 12)),  # no triangle has 4 entries
        (module("oft", {"blocks": np.ones((4, 3, 3), "f4"), "rescale": np.ones(3, "f4")}, (12,)), (12, 4)),
        (module("full", {"diff": np.ones((4, 3), "f4")}, (4, 3)), (3, 4)),
        (module("norm", {"diff": np.ones(4, "f4")}, (4,)), (5,)),
        (
            module(
                "dora",
                {"up": np.ones((4, 1), "f4"), "down": np.ones((1, 6), "f4"), "magnitude": np.ones(6, "f4")},
                (4, 6),
                1.0,
            ),
            (4, 6),
        ),
        (
            module(
                "dora",
                {"up": np.ones((4, 1), "f4"), "down": np.ones((1, 6), "f4"), "magnitude": np.ones(4, "f4")},
                (4, 6),
                1.0,
                magnitude_axis=1,
            ),
            (4, 6),
        ),
    ],
)
def test_what_does_not_fit_its_weight_is_an_error(made: Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch):
        merged({"fc.weight": np.ones(shape, "f4")}, made)


def test_rotations_fit_the_weight_they_are_given() -> None:
    update = Rotated((Stage(np.zeros((4, 3, 3))),))
    assert isinstance(update, Fitting)
    assert not isinstance(update, Delta)
    assert update.fitted((12, 5)).shape == (12, 5)
    for wrong in ((5, 12), (24, 5)):
        with pytest.raises(ShapeMismatch):
            update.fitted(wrong)
    shared = Rotated((Stage(np.zeros((1, 3, 3))),), on_input=True)
    assert shared.fitted((5, 12)).shape == (5, 12)
    with pytest.raises(ShapeMismatch):
        shared.fitted((5, 13))
    assert unpacked(np.zeros((2, 0))).shape == (2, 1, 1)


def test_gloras_order_is_told_by_the_shapes() -> None:
    new = {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8, 3, 3)}
    old = {"a1": (2, 8), "a2": (8, 2), "b1": (2, 8, 3, 3), "b2": (8, 2)}
    assert arrangement(new) == ("new", 2)
    assert arrangement(old) == ("old", 2)
    square = {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8)}  # could be rank 8 of a 2 x 2 weight
    assert arrangement(square) == ("new", 2)
    with pytest.raises(Unsupported, match="order cannot be told"):
        arrangement(dict.fromkeys(("a1", "a2", "b1", "b2"), (8, 8)))
    with pytest.raises(ShapeMismatch):
        arrangement({**new, "b1": (8, 3)})


def test_factors_of_a_part_of_a_product_are_rows_of_its_own() -> None:
    rng = np.random.default_rng(0)
    whole = Kronecker(normal(rng, 4, 2) @ normal(rng, 2, 5), normal(rng, 3, 4), 1.0)
    part = whole.part(Span(2, 9), None)
    found = factored(part)
    assert found.up.shape == (7, 2 * 3)
    np.testing.assert_allclose(found.up @ found.down, whole.rows(2, 9), rtol=1e-4, atol=1e-5)


@given(
    out=st.integers(1, 12),
    into=st.integers(1, 12),
    rank=st.integers(1, 4),
    seed=seeds,
    scaling=st.sampled_from([1.0, -0.5]),
)
@settings(deadline=None)
def test_a_whole_matrix_is_measured_without_its_identity(
    out: int, into: int, rank: int, seed: int, scaling: float
) -> None:
    rng = np.random.default_rng(seed)
    dense, up, down = normal(rng, out, into), normal(rng, out, rank), normal(rng, rank, into)
    full = replace(factored(Dense(dense)), scaling=scaling)
    assert whole(full) is not None
    other = LowRank(up, down, 2.0)
    wide, product = scaling * dense.astype(np.float64), 2.0 * up.astype(np.float64) @ down
    np.testing.assert_allclose(norm(full), np.linalg.norm(wide), rtol=1e-9)
    np.testing.assert_allclose(
        singular_values(full), np.linalg.svd(wide, compute_uv=False), rtol=1e-6, atol=1e-6
    )
    for one, two, a, b in (
        (full, other, wide, product),
        (other, full, product, wide),
        (full, full, wide, wide),
    ):
        found = compare(one, two)
        np.testing.assert_allclose(
            [found.norm_a, found.norm_b], [np.linalg.norm(a), np.linalg.norm(b)], rtol=1e-6
        )
        np.testing.assert_allclose(found.distance, np.linalg.norm(a - b), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.inner, np.vdot(a, b), rtol=1e-6, atol=1e-6)
    shuffled = np.eye(max(2, out), dtype=np.float32)[::-1]
    assert whole(LowRank(shuffled, np.ones((len(shuffled), 3), "f4"))) is None
    nearly = np.eye(5, dtype=np.float32)
    nearly[4, 2] = 1
    assert whole(LowRank(nearly, np.ones((5, 3), "f4"))) is None


@pytest.mark.parametrize("kind", EVERY)
def test_two_of_a_kind_are_compared_as_they_are_stored_or_as_what_they_add(kind: str) -> None:
    one, again = adapter(every(kind)), adapter(every(kind))
    same = lt.diff(one, again)
    assert same.identical
    assert same.modules[0].norm_a > 0
    role = next(iter(every(kind).tensors))
    values = {name: ref.load() for name, ref in every(kind).tensors.items()}
    values[role] = values[role] + 1
    made = every(kind)
    other = adapter(module(kind, values, made.shape, made.scaling, **made.options))
    assert not lt.diff(one, other).identical


@pytest.mark.parametrize("kind", ["norm", "full"])
def test_vectors_stay_what_they_are_when_they_are_combined(kind: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {"diff": normal(rng, 6), "diff_bias": normal(rng, 6)}
    if kind == "full":
        del arrays["diff"]  # a bias alone
    one = adapter(module(kind, arrays, (6,), 1.0))
    made = lt.combine([one, one], weights=[0.5, 0.25]).adapter.modules["fc"]
    assert (made.kind, made.shape, made.tensors.keys()) == (kind, (6,), arrays.keys())
    base = {"fc.weight": normal(rng, 6), "fc.bias": normal(rng, 6)}
    found = merged(base, made)
    for key, role in (("fc.weight", "diff"), ("fc.bias", "diff_bias")):
        np.testing.assert_allclose(found[key], base[key] + 0.75 * arrays.get(role, 0), rtol=1e-5, atol=1e-6)
    again = lt.reduce(one, rank=1)
    assert not again.dropped
    np.testing.assert_allclose(
        merged(base, again.adapter.modules["fc"])["fc.bias"], base["fc.bias"] + arrays["diff_bias"], rtol=1e-6
    )


def test_a_sum_with_a_whole_matrix_is_one_matrix() -> None:
    rng = np.random.default_rng(0)
    dense, up, down = normal(rng, 5, 7), normal(rng, 5, 2), normal(rng, 2, 7)
    for terms, wanted in (
        ([(0.5, factored(Dense(dense))), (2.0, LowRank(up, down, 0.5))], 0.5 * dense + up @ down),
        ([(1.0, factored(Dense(dense))), (-1.0, factored(Dense(dense)))], 0 * dense),
    ):
        found = add(terms)
        assert found.up.shape == (5, 5)
        np.testing.assert_allclose(found.up @ found.down, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("core", [False, True])
def test_a_normalised_dora_has_its_magnitudes_where_they_were(axis: int, core: bool) -> None:
    rng = np.random.default_rng(0)
    ones = (1, 1) if core else (3, 3)
    arrays = {"up": normal(rng, 6, 2, 1, 1), "down": normal(rng, 2, 6, *ones), "magnitude": normal(rng, 6)}
    if core:
        arrays["mid"] = normal(rng, 2, 2, 3, 3)
    made = module("dora", arrays, (6, 6, 3, 3), 0.5, magnitude_axis=axis)
    base = {"fc.weight": normal(rng, 6, 6, 3, 3)}
    found = merged(base, lt.normalize(adapter(made)).adapter.modules["fc"])["fc.weight"]
    assert distance(found, merged(base, made)["fc.weight"].astype(np.float64)) < 1e-6


def step_of(weight: Array, made: Module, target: Target) -> Any:
    """The one step of a weight that a module changes at a place."""
    base = TensorRef(MemorySource({"fc.weight": weight}), "fc.weight")
    contribution = Contribution(1.0, (Term("fc", made, target),))
    _, (step,) = plan_steps({"model": [Output("fc.weight", base.spec, base, (contribution,))]}, {})
    return step


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_fused_weight_is_changed_as_it_would_be_alone(kind: str, transposed: bool) -> None:
    made = every(kind)
    weight = normal(np.random.default_rng(0), 36, 12)
    wanted = weight.copy()
    wanted[12:24] = merged({"fc.weight": weight[12:24].copy()}, made)["fc.weight"]
    if kind == "set" and transposed:
        wanted[12:24] = wanted[12:24].T  # which is saved as it is stored
    span = Span(12, 24)
    target = Target("fc.weight", cols=span, transposed=True) if transposed else Target("fc.weight", rows=span)
    step = step_of(weight.T.copy() if transposed else weight, made, target)
    found = np.concatenate([block.values.copy() for block in blocks(step)])
    np.testing.assert_allclose(found.T if transposed else found, wanted, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_rotation_has_no_meaning() -> None:
    step = step_of(np.ones((6, 12), np.float32), every("oft"), Target("fc.weight", delta_rows=Span(0, 6)))
    with pytest.raises(Unsupported, match="fc is oft, of which a part has no meaning"):
        list(blocks(step))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_survival_is_measured_where_squares_overflow(kind: Any) -> None:
    from loratools.computing import Block, Survival

    seen, before = Survival(), np.array([[1.0, 2.0, np.nan]], kind)
    after = np.array([[1e30, 2.0, np.nan]], kind)
    with np.errstate(over="ignore", invalid="ignore"):  # as in the threads that run it
        seen.add(Block(0, after, before), after)
    assert seen.share == 1.0
    assert (seen.unchanged, seen.count) == (1, 2)
