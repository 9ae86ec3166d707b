"""Our merge against PEFT's ``merge_and_unload``: every kind of layer, option and element type."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    BdLoraConfig,
    FourierFTConfig,
    IA3Config,
    KasaConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratools as lt
from loratools.errors import LoratoolsError, Mismatch, ShapeMismatch, Unsupported
from tests.helpers import (
    assert_same,
    assert_same_tensors,
    differing,
    digest,
    load_state,
    make_adapter,
    merged_by_peft,
    merged_by_us,
    randomise,
    relative,
    rounded_once,
    save_adapter,
    save_state,
    write_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# PEFT says so for every layer of GPT-2's kind, or of torch's, in a model that has both; its stored flag is what the
# tests show we do not need.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # The toy model has no config.json, which PEFT remarks on when it saves embeddings.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    # PEFT takes a bias for a shard of a matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]

BASES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FILES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Block(nn.Module):
    """GPT-2's names: a square Conv1D in ``attn`` that only its namesake in ``mlp`` tells to be one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": Conv1D(2 * width, width), "c_proj": Conv1D(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(3 * width, width), "c_proj": Conv1D(width, 3 * width)})
        self.up = nn.Linear(width, 2 * width)
        self.square = nn.Linear(width, width)


class Toy(nn.Module):
    """One of each layer PEFT adapts. Never run: only its weights matter."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, width)
        self.wide = nn.Linear(256, 384)
        self.bare = nn.Linear(384, 256, bias=False)
        self.square = nn.Linear(256, 256)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.line = nn.Conv1d(96, 128, 5)
        self.point = nn.Conv2d(192, 128, 1)
        self.plane = nn.Conv2d(64, 96, 3)
        self.volume = nn.Conv3d(32, 48, 3)
        self.attention = nn.MultiheadAttention(128, 4)
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 300)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def toy(dtype: torch.dtype, seed: int = 0) -> Toy:
    """The model with weights from a seed, of a size that leaves a delta visible in 16 bits."""
    model = Toy()
    randomise(model, seed, scale=0.08)
    return model.to(dtype)


LINEAR = ["wide", "bare", "square"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
CONV = ["line", "point", "plane", "volume"]


@dataclass(frozen=True)
class Case:
    """A configuration, as a function, because PEFT writes into the object it is given."""

    name: str
    config: Callable[[], Any]
    # Whether PEFT rounds the delta to a 16-bit base's type before it adds it; float64 is then the only oracle.
    twice: bool = False
    wide: torch.dtype = torch.float64  # in which PEFT computes the truth


def lora(**options: Any) -> Callable[[], LoraConfig]:
    fields = {"r": 6, "lora_alpha": 10, "init_lora_weights": False, "target_modules": LINEAR}
    return lambda: LoraConfig(**copy.deepcopy({**fields, **options}))


CASES = [
    Case("linear", lora()),
    Case("linear-power-of-two", lora(r=8, lora_alpha=16)),
    Case("conv1d-of-gpt2", lora(target_modules=GPT2)),
    Case("mixed-linear-and-gpt2", lora(target_modules=[*LINEAR, *GPT2, "up"])),
    Case("embedding", lora(target_modules=["embed"]), twice=True),
    Case("convolutions", lora(target_modules=CONV)),
    Case("attention", lora(target_modules=["attention"]), twice=True),
    Case("rslora", lora(use_rslora=True, target_modules=[*LINEAR, *GPT2, *CONV])),
    Case("rslora-embedding", lora(use_rslora=True, target_modules=["embed"]), twice=True),
    Case(
        "rank-pattern",
        lora(
            target_modules=[*LINEAR, *GPT2, "up", "wide", *CONV],
            # PEFT writes its configuration with sorted keys, and then goes by the order it finds.
            rank_pattern={"^wide": 9, "attn.c_proj": 3, "c_proj": 5, r"layers\.\d\.up": 7, "plane": 2},
        ),
    ),
    Case(
        "alpha-pattern-first-match",
        lora(
            target_modules=[*LINEAR, *GPT2, "up", *CONV],
            # The first that matches wins, however much better a later one fits.
            alpha_pattern={"c_proj": 3, "layers.0.attn.c_proj": 50, "square|wide": 7, "line": 1.5},
            rank_pattern={"layers.[01].mlp.c_proj": 4},
            use_rslora=True,
        ),
    ),
    Case(
        "attention-patterns",
        lora(
            target_modules=["attention"],
            rank_pattern={"attention": 4},
            alpha_pattern={"attention": 5},
        ),
        twice=True,
    ),
    Case(
        "attention-rslora-bias", lora(target_modules=["attention"], use_rslora=True, bias="all"), twice=True
    ),
    Case("dora-linear", lora(use_dora=True, target_modules=[*LINEAR, "up"])),
    Case("dora-gpt2", lora(use_dora=True, target_modules=GPT2)),
    Case("dora-embedding", lora(use_dora=True, target_modules=["embed"])),
    Case("dora-convolutions", lora(use_dora=True, target_modules=CONV)),
    Case("dora-rslora-patterns", lora(use_dora=True, use_rslora=True, rank_pattern={"wide": 3})),
    Case("lora-bias", lora(lora_bias=True, target_modules=["wide", "square", *GPT2, *CONV])),
    Case("bias-all", lora(bias="all", target_modules=[*LINEAR, "c_proj", "plane"])),
    Case("bias-lora-only", lora(bias="lora_only", target_modules=[*LINEAR, "c_proj", "plane"])),
    Case("modules-to-save", lora(modules_to_save=["head", "norm"])),
    Case("embedding-to-save", lora(modules_to_save=["embed"])),
    Case("attention-to-save", lora(modules_to_save=["attention"])),
    Case(
        "tokens-and-head",
        lora(target_modules=LINEAR, modules_to_save=["head"], trainable_token_indices=[4, 2]),
    ),
    Case("token-rows-list", lora(trainable_token_indices=[3, 0, 499])),
    Case("token-rows-named", lora(trainable_token_indices={"embed": [7, 250]})),
    Case(
        "exclude-modules",
        lora(target_modules=["square", "up", "c_proj"], exclude_modules=["layers.1.square", "mlp.c_proj"]),
    ),
    Case(
        "layers-to-transform",
        lora(target_modules=["up", "c_attn"], layers_to_transform=[1], layers_pattern="layers"),
    ),
    Case("targets-by-pattern", lora(target_modules=r"layers\.0\.(attn|mlp)\.c_.*|wide")),
    # PEFT takes no float64 base for this one.
    Case("mica", lora(init_lora_weights="mica"), twice=True, wide=torch.float32),
    Case("orthogonal", lora(init_lora_weights="orthogonal")),
    Case(
        "bd-lora",
        lora(
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["wide", "c_fc"],
                target_modules_bd_b=["square", "c_proj"],
                nblocks=4,
                match_strict=False,
            ),
            r=8,
            lora_alpha=10,
            target_modules=[*LINEAR, "up"],
        ),
        twice=True,
    ),
    Case(
        "adalora",
        lambda: AdaLoraConfig(
            init_r=6,
            target_r=3,
            lora_alpha=10,
            total_step=10,
            target_modules=[*LINEAR, *GPT2, "plane", "point"],
            init_lora_weights=False,
        ),
    ),
    Case(
        "ia3",
        lambda: IA3Config(
            target_modules=[*LINEAR, *GPT2, "up", "point", "plane", "volume"],
            feedforward_modules=["bare", "c_proj", "plane"],
            init_ia3_weights=False,
        ),
    ),
    Case(
        "ia3-by-pattern",
        lambda: IA3Config(
            target_modules=r"wide|square|.*c_proj",
            feedforward_modules=r"square|.*mlp\.c_proj",
            init_ia3_weights=False,
        ),
    ),
    Case(
        "loha-linear",
        lambda: LoHaConfig(
            r=4,
            alpha=7,
            target_modules=[*LINEAR, "up"],
            rank_pattern={"up": 3},
            alpha_pattern={"wide": 11},
            init_weights=False,
        ),
    ),
    Case(
        "loha-conv",
        lambda: LoHaConfig(r=4, alpha=7, target_modules=["line", "point", "plane"], init_weights=False),
    ),
    Case(
        "loha-conv-effective",
        lambda: LoHaConfig(
            r=4,
            alpha=7,
            target_modules=["line", "point", "plane"],
            use_effective_conv2d=True,
            init_weights=False,
        ),
    ),
    Case(
        "lokr-linear",
        lambda: LoKrConfig(
            r=4, alpha=7, target_modules=[*LINEAR, "up"], rank_pattern={"up": 64}, init_weights=False
        ),
    ),
    Case(
        "lokr-both",
        lambda: LoKrConfig(
            r=3, alpha=7, target_modules=LINEAR, decompose_both=True, decompose_factor=16, init_weights=False
        ),
    ),
    Case(
        "lokr-factor",
        lambda: LoKrConfig(r=2, alpha=7, target_modules=LINEAR, decompose_factor=4, init_weights=False),
    ),
    Case(
        "lokr-conv",
        lambda: LoKrConfig(r=3, alpha=7, target_modules=["line", "point", "plane"], init_weights=False),
    ),
    Case(
        "lokr-conv-effective",
        lambda: LoKrConfig(
            r=3,
            alpha=7,
            target_modules=["line", "point", "plane"],
            use_effective_conv2d=True,
            init_weights=False,
        ),
    ),
    Case(
        "lokr-conv-full",
        lambda: LoKrConfig(r=64, alpha=7, target_modules=["line", "point", "plane"], init_weights=False),
    ),
    Case(
        "trainable-tokens", lambda: TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 8, 490])
    ),
]


# Standard deviations that make the delta of each kind about a tenth of the weights, as training does.
SCALES = {"hada_": 0.2, "lokr_": 0.1, "lora_E": 1.0, "lora_diag": 1.0, "": 0.05}
# What starts from values of the base (or from ones) moves by a fifth.
NEAR = ("lora_magnitude", "modules_to_save", "token", "ia3_l")


def trained(
    case: Case, folder: Path, base: torch.dtype, file: torch.dtype | None, *, seed: int = 1,
    model: Callable[[torch.dtype], nn.Module] | None = None, size: float = 1.0,
) -> Path:  # fmt: skip
    """An adapter folder with every trained tensor moved away from where it started, by much or by little."""
    wrapped = get_peft_model((model or toy)(base), case.config())
    generator = torch.Generator().manual_seed(seed)
    for name, value in wrapped.named_parameters():
        if not value.requires_grad:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if any(part in name for part in NEAR):
            value.data *= (1 + 0.2 * noise).to(value.dtype)
        else:
            value.data.copy_(noise * size * next(scale for part, scale in SCALES.items() if part in name))
    return save_adapter(wrapped, folder, dtype=file)


# Each step of float32 arithmetic (product, scaling, sum; DoRA's norm) errs by half a unit of its own, which turns the
# rounding to 16 bits that follows in this many times as many elements as the order of two steps does.
WIDE = 5


def the_truth(
    adapter: Path, dtype: torch.dtype, *, wide: torch.dtype = torch.float64,
    model: Callable[[torch.dtype], nn.Module] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What PEFT computes in float64 from the base's values, rounded once to its type."""
    found = merged_by_peft((model or toy)(dtype).to(wide), adapter)
    like = torch.empty(0, dtype=dtype)
    return {name: rounded_once(value, like) for name, value in found.items()}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_merge_as_peft_merges(case: Case, base: str, file: str, tmp_path: Path) -> None:
    dtype = BASES[base]
    adapter = trained(case, tmp_path / "adapter", dtype, FILES[file])
    before = toy(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    assert_same_tensors(actual, the_truth(adapter, dtype, wide=case.wide), before, slack=WIDE)
    if base == "f32" or not case.twice:
        assert_same_tensors(actual, merged_by_peft(toy(dtype), adapter), before)


# A training run changes weights by a few hundredths; two factors at 0.15 of the scale above do that.
SMALL = 0.15


@pytest.mark.parametrize("base", ["bf16", "f16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.twice], ids=lambda case: case.name)
def test_where_peft_rounds_twice_a_change_of_usual_size_is_float64_rounded_once(
    case: Case, base: str, tmp_path: Path
) -> None:
    dtype = BASES[base]
    adapter = trained(case, tmp_path / "adapter", dtype, None, size=SMALL)
    before = toy(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    assert_same_tensors(actual, the_truth(adapter, dtype, wide=case.wide), before)


def test_a_16_bit_adapter_kept_in_16_bits_rounds_twice_in_peft_and_once_here(tmp_path: Path) -> None:
    # With autocast off, or with safe_merge, PEFT rounds the delta to bfloat16 and adds that; ours is nearer the truth.
    adapter = trained(CASES[0], tmp_path / "adapter", torch.bfloat16, torch.bfloat16)
    before = toy(torch.bfloat16).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    name = "wide.weight"
    ours = merged_by_us(source, adapter, tmp_path / "out.safetensors")[name]
    truth = the_truth(adapter, torch.bfloat16)[name]
    assert differing(name, ours, truth) < 5e-5 * truth.numel()
    for options in ({"autocast_adapter_dtype": False}, {"safe": True}):
        theirs = merged_by_peft(toy(torch.bfloat16), adapter, **options)[name]
        assert (theirs != truth).float().mean() > 0.01


# --- experts ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Parameters of all experts in one tensor each; transformers marks those stored (in, out)."""

    def __init__(self, shape: tuple[int, int], *, transposed: bool) -> None:
        super().__init__()
        out, into = shape
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.zeros(3, *((into, out) if transposed else (out, into))))
        self.down_proj = nn.Parameter(torch.zeros(3, *((out // 2, into) if transposed else (into, out // 2))))
        if transposed:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, out))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 160))


class Mixture(nn.Module):
    def __init__(self, shape: tuple[int, int], *, transposed: bool) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts(shape, transposed=transposed)
        self.mlp.gate = Router()
        self.proj = nn.Linear(160, 96)


MIXTURES = {"wide": (256, 160), "square": (160, 160)}


# It looks for modules of that name, though it uses the patterns for parameters.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("shape", MIXTURES)
@pytest.mark.parametrize(
    "parameters",
    [
        ["mlp.experts.gate_up_proj"],
        ["mlp.experts.down_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
    ],
    ids=["gate_up", "down", "all"],
)
def test_experts_merge_as_peft_merges(
    parameters: list[str], shape: str, transposed: bool, base: str, tmp_path: Path
) -> None:
    dtype = BASES[base]

    def mixture(dtype: torch.dtype) -> Mixture:
        model = Mixture(MIXTURES[shape], transposed=transposed)
        randomise(model, 3, scale=0.08)
        return model.to(dtype)

    def config() -> LoraConfig:
        return LoraConfig(
            r=4, lora_alpha=7, target_modules=["proj"], target_parameters=parameters, init_lora_weights=False,
            alpha_pattern={"experts.down_proj": 5}, rank_pattern={"experts.gate_up_proj": 6},
        )  # fmt: skip

    adapter = trained(Case("experts", config), tmp_path / "adapter", dtype, None, model=mixture)
    before = mixture(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    # In 16 bits PEFT rounds the experts' delta to the base's type before it adds it.
    assert_same_tensors(
        actual, the_truth(adapter, dtype, model=mixture), before, slack=1 if base == "f16" else WIDE
    )
    if base == "f32":
        assert_same_tensors(actual, merged_by_peft(mixture(dtype), adapter), before)


# --- bases that the initialisation changed --------------------------------------------------------------------------


class Small(nn.Module):
    """A network that can be trained, with a layer in each orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(96, 160)
        self.tall = nn.Linear(160, 64)
        self.square = nn.Linear(64, 64)
        self.c_fc = Conv1D(128, 64)
        self.c_proj = Conv1D(48, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tall(torch.tanh(self.wide(x)))
        return self.c_proj(torch.tanh(self.c_fc(torch.tanh(self.square(x)))))


def small(dtype: torch.dtype = torch.float32) -> Small:
    """Weights whose singular values fall by a tenth each, as trained ones do.

    Among the nearly equal ones of random matrices, float32 cannot tell the largest few from the next.
    """
    model = Small()
    randomise(model, 7, scale=0.1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            u, s, v = torch.linalg.svd(parameter.data.double(), full_matrices=False)
            parameter.data.copy_((u * 0.9 ** torch.arange(len(s))) @ v)
    return model.to(dtype)


def train(model: nn.Module, steps: int = 5) -> nn.Module:
    """A few real steps on random data."""
    generator = torch.Generator().manual_seed(11)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        x, y = torch.randn(32, 96, generator=generator), torch.randn(32, 48, generator=generator)
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
    return model


def merged_in_place(model: Any) -> dict[str, torch.Tensor]:
    """The weights that the trained model in memory computes with: its own, changed base and the delta."""
    return {n: v.detach().clone() for n, v in copy.deepcopy(model).merge_and_unload().state_dict().items()}


LINEARS = ["wide", "tall", "square"]
CHANGED = {
    "pissa": lambda: LoraConfig(
        r=5, lora_alpha=8, init_lora_weights="pissa", target_modules=[*LINEARS, "c_fc", "c_proj"],
        rank_pattern={"tall": 3},
    ),
    "pissa-rslora": lambda: LoraConfig(
        r=5, lora_alpha=8, init_lora_weights="pissa", target_modules=LINEARS, use_rslora=True
    ),
    "olora": lambda: LoraConfig(
        r=5, lora_alpha=8, init_lora_weights="olora", target_modules=LINEARS, alpha_pattern={"tall": 3}
    ),
    "kasa": lambda: LoraConfig(r=5, lora_alpha=8, kasa_config=KasaConfig(), target_modules=LINEARS),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_adapters_on_a_changed_base_merge_into_the_original(name: str, tmp_path: Path) -> None:
    before = small().state_dict()
    model = train(get_peft_model(small(), CHANGED[name]()))
    adapter = save_adapter(model, tmp_path / "adapter")
    assert lt.load(adapter).config.raw["init_lora_weights"] in {"pissa", "olora", True}
    expected = merged_in_place(model)
    actual = merged_by_us(
        save_state(before, tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors"
    )
    plain = {k: v.double() for k, v in before.items()}
    for key, truth in expected.items():
        # PEFT decomposes in float32, whose error in the part taken out is several units of the weight.
        assert relative(actual[key], truth) < 2e-6, key
    moved = relative(plain["wide.weight"], expected["wide.weight"])
    assert moved > 1e-2


def test_olora_decomposes_a_transposed_weight_as_it_is_stored(tmp_path: Path) -> None:
    # Only a square one can be trained at all: PEFT's factors do not fit any other.
    def model() -> nn.Module:
        found = nn.ModuleDict({"mlp": nn.ModuleDict({"c_proj": Conv1D(96, 160)}), "c_proj": Conv1D(96, 96)})
        randomise(found, 2, scale=0.1)
        return found

    config = LoraConfig(r=5, lora_alpha=8, init_lora_weights="olora", target_modules="c_proj")
    wrapped = get_peft_model(model(), config)
    randomise(wrapped, 3, only="lora_")
    adapter = save_adapter(wrapped, tmp_path / "adapter")
    expected = merged_in_place(wrapped)
    source = save_state(model().state_dict(), tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    assert_same_tensors(actual, expected, model().state_dict())


@pytest.mark.parametrize("alone", [False, True], ids=["beside-c_attn", "alone"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_square_conv1d_that_no_namesake_gives_away(kind: str, alone: bool, tmp_path: Path) -> None:
    # GPT-2's cross-attention has such a q_attn; its neighbour c_attn is not square. Alone, only PEFT's flag tells.
    def model(dtype: torch.dtype = torch.float32) -> nn.Module:
        inner = {"q_attn": Conv1D(96, 96)} if alone else {"q_attn": Conv1D(96, 96), "c_attn": Conv1D(192, 96)}
        found = nn.ModuleDict({"crossattention": nn.ModuleDict(inner), "square": nn.Linear(96, 96)})
        randomise(found, 2, scale=0.1)
        return found.to(dtype)

    config = lora(target_modules=["q_attn"]) if kind == "lora" else lambda: IA3Config(
        target_modules=["q_attn"], feedforward_modules=[]
    )  # fmt: skip
    adapter = trained(Case(kind, config), tmp_path / "adapter", torch.float32, None, model=model)
    before = model().state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    assert_same_tensors(actual, merged_by_peft(model(), adapter), before)


@pytest.mark.parametrize("dtype", BASES.values(), ids=BASES)
@pytest.mark.parametrize("method", ["pissa", "olora", "kasa"])
def test_the_part_taken_out_is_the_decomposition_in_float64(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # In 16 bits PEFT rounds the base without that part before it adds the delta; here the result is rounded only.
    adapter = save_adapter(train(get_peft_model(small(), CHANGED[method]())), tmp_path / "adapter")
    before = small(dtype).state_dict()
    actual = merged_by_us(
        save_state(before, tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors"
    )
    trained_tensors = load_state(adapter)
    for name, rank, scaling in (("wide", 5, 8 / 5), ("square", 5, 8 / 5)):
        weight = before[f"{name}.weight"].double().numpy()
        up, down = (
            trained_tensors[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "BA"
        )
        if method == "olora":
            q, r = np.linalg.qr(weight)
            taken = scaling * q[:, :rank] @ r[:rank]
        else:
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            part = slice(0, rank) if method == "pissa" else slice(len(s) - rank, None)
            taken = (u[:, part] * s[part]) @ v[part]
        if method == "kasa":
            up = up * trained_tensors[f"base_model.model.{name}.lora_diag"].double().numpy()
        truth = torch.from_numpy(weight - taken + scaling * up @ down)
        assert_same(name, actual[f"{name}.weight"], rounded_once(truth, before[f"{name}.weight"]), slack=WIDE)


# --- several adapters, and weights ----------------------------------------------------------------------------------


def plain_pair(folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Two LoRAs of different ranks, scales and modules."""
    first = Case("first", lora(r=6, lora_alpha=10, target_modules=["wide", "square", "c_proj", "embed"]))
    second = Case(
        "second", lora(r=3, lora_alpha=7, use_rslora=True, target_modules=["wide", "plane", "c_proj"])
    )
    return [
        trained(case, folder / case.name, dtype, None, seed=seed)
        for seed, case in enumerate((first, second), start=5)
    ]


def summed(adapters: list[Path], weights: list[float], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """W + Σ wᵢ (Uᵢ(W) - W) in float64, each Uᵢ being what PEFT makes of W alone; rounded once."""
    base = toy(dtype).double().state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, value in merged_by_peft(toy(dtype).double(), adapter).items():
            total[name] += weight * (value - base[name])
    return {name: rounded_once(value, torch.empty(0, dtype=dtype)) for name, value in total.items()}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3], [0.3, 0.0]])
def test_two_adapters_are_summed_against_the_original(
    weights: list[float], base: str, tmp_path: Path
) -> None:
    # PEFT adds one after another and rounds in between, so in 16 bits only float64 is the oracle.
    dtype = BASES[base]
    adapters = plain_pair(tmp_path, dtype)
    before = toy(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapters, tmp_path / "out.safetensors", weights=weights)
    assert_same_tensors(actual, summed(adapters, weights, dtype), before, slack=WIDE)


def test_two_plain_adapters_are_what_peft_concatenates(tmp_path: Path) -> None:
    cases = [Case("a", lora(r=6, lora_alpha=10)), Case("b", lora(r=3, lora_alpha=7))]
    adapters = [trained(c, tmp_path / c.name, torch.float32, None, seed=s) for s, c in enumerate(cases)]
    model = PeftModel.from_pretrained(toy(torch.float32), adapters[0], adapter_name="a")
    model.load_adapter(adapters[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.6, 1.7], "both", combination_type="cat")
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    before = toy(torch.float32).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapters, tmp_path / "out.safetensors", weights=[0.6, 1.7])
    assert_same_tensors(actual, expected, before)


@pytest.mark.parametrize("base", BASES)
def test_three_adapters_of_different_kinds(base: str, tmp_path: Path) -> None:
    # DoRA and IA3 need the weight: each is taken against the original base, then the differences are added.
    dtype = BASES[base]
    cases = [
        Case("dora", lora(use_dora=True, target_modules=["wide", "c_proj"])),
        Case(
            "ia3",
            lambda: IA3Config(target_modules=["wide", "square", "plane"], feedforward_modules=["square"]),
        ),
        Case("loha", lambda: LoHaConfig(r=4, alpha=7, target_modules=["wide", "plane"], init_weights=False)),
    ]
    weights = [0.5, 0.8, 1.5]
    adapters = [trained(c, tmp_path / c.name, dtype, None, seed=s) for s, c in enumerate(cases)]
    before = toy(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapters, tmp_path / "out.safetensors", weights=weights)
    assert_same_tensors(actual, summed(adapters, weights, dtype), before, slack=WIDE)


@pytest.mark.parametrize("base", BASES)
def test_two_doras_are_both_taken_against_the_original(base: str, tmp_path: Path) -> None:
    # PEFT scales the first one's result by the second one's magnitudes; here neither sees the other.
    dtype = BASES[base]
    case = Case("dora", lora(use_dora=True, target_modules=["wide", "c_proj", "plane"]))
    adapters = [trained(case, tmp_path / str(seed), dtype, None, seed=seed) for seed in (1, 2)]
    before = toy(dtype).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapters, tmp_path / "out.safetensors", weights=[1, 0.5])
    assert_same_tensors(actual, summed(adapters, [1, 0.5], dtype), before, slack=WIDE)


# It takes AdaLoRA's record of what was kept for LoRA's patterns.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_adalora_merges_with_the_ranks_that_pruning_left(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=8, target_r=3, lora_alpha=10, tinit=1, tfinal=1, deltaT=1, total_step=8, target_modules=LINEARS
    )
    model = get_peft_model(small(), config)
    generator = torch.Generator().manual_seed(11)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 9):
        x, y = torch.randn(32, 96, generator=generator), torch.randn(32, 48, generator=generator)
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
    adapter = save_adapter(model, tmp_path / "adapter")
    ranks = [module.rank for module in lt.load(adapter).modules.values()]
    assert sum(ranks) == 9
    assert len(set(ranks)) > 1, "pruning was to leave different ranks"
    before = small().state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    actual = merged_by_us(source, adapter, tmp_path / "out.safetensors")
    assert_same_tensors(actual, merged_by_peft(small(), adapter), before)


@pytest.mark.parametrize("kind", ["linear", "loha-conv", "lokr-both", "adalora", "embedding", "bd-lora"])
def test_a_negative_weight_takes_an_adapter_out_again(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == kind)
    adapter = trained(case, tmp_path / "adapter", torch.float32, None)
    before = toy(torch.float32).state_dict()
    source = save_state(before, tmp_path / "base.safetensors")
    merged_by_us(source, adapter, tmp_path / "merged.safetensors")
    restored = merged_by_us(
        tmp_path / "merged.safetensors", adapter, tmp_path / "out.safetensors", weights=[-1]
    )
    for name, value in before.items():
        assert relative(restored[name], value) < 1e-6, name


@pytest.mark.parametrize("kind", ["dora-linear", "ia3", "modules-to-save", "trainable-tokens"])
def test_what_is_no_plain_sum_cannot_be_taken_out(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == kind)
    adapter = trained(case, tmp_path / "adapter", torch.float32, None)
    source = save_state(toy(torch.float32).state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(Unsupported, match=r"\w is not a plain sum"):
        lt.merge(source, adapter, tmp_path / "out.safetensors", weights=[-1])
    assert not (tmp_path / "out.safetensors").exists()


# --- memory, executors ----------------------------------------------------------------------------------------------

EVERYTHING = [
    "linear",
    "conv1d-of-gpt2",
    "dora-gpt2",
    "dora-convolutions",
    "ia3",
    "lokr-conv",
    "modules-to-save",
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", EVERYTHING)
def test_memory_gives_the_bytes_of_files(kind: str, base: str, tmp_path: Path) -> None:
    case, dtype = next(case for case in CASES if case.name == kind), BASES[base]
    adapter = trained(case, tmp_path / "adapter", dtype, None)
    before = toy(dtype).state_dict()
    written = merged_by_us(
        save_state(before, tmp_path / "base.safetensors"), adapter, tmp_path / "out.safetensors"
    )
    config = lt.load(adapter).config.raw
    held = lt.merge(before, lt.load(load_state(adapter), config=config)).state_dict
    assert held is not None
    assert set(held) == set(written)
    for name, value in written.items():
        assert torch.equal(held[name], value), name


@pytest.mark.parametrize("kind", [*EVERYTHING, "pissa"])
def test_any_number_of_workers_writes_the_same_bytes(kind: str, tmp_path: Path) -> None:
    if kind == "pissa":
        model, adapter = small(), save_adapter(get_peft_model(small(), CHANGED[kind]()), tmp_path / "adapter")
    else:
        case = next(case for case in CASES if case.name == kind)
        model, adapter = toy(torch.bfloat16), trained(case, tmp_path / "adapter", torch.bfloat16, None)
    source = save_state(model.state_dict(), tmp_path / "base.safetensors")
    found = []
    for executor, jobs in (("inline", 1), ("threads", 1), ("threads", 2), ("threads", 3), ("threads", 3)):
        out = tmp_path / f"{executor}-{jobs}-{len(found)}" / "out.safetensors"
        out.parent.mkdir()
        lt.merge(source, adapter, out, executor=executor, jobs=jobs, sync=False)
        found.append(digest(out))
    assert all(one == found[0] for one in found), found


# --- what has no meaning as an update of the weights ---------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, base: nn.Module | None = None) -> LoratoolsError:
    """The error that a merge of this adapter raises; nothing may have been written."""
    source = save_state((base or small()).state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(LoratoolsError) as caught:
        lt.merge(source, folder, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
    return caught.value


REFUSED = {
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, "randomised SVD", "path_initial_model"),
    "corda": ({"init_lora_weights": "corda"}, "CorDA", "path_initial_model"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "LoRA-GA", "path_initial_model"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ", ""),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA", "keep it as an adapter"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "Arrow", ""),
    "qalora": ({"use_qalora": True, "qalora_group_size": 16}, "QALoRA", ""),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication", "write out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_base_alone_cannot_tell_is_refused_by_name(name: str, tmp_path: Path) -> None:
    fields, reason, way_out = REFUSED[name]
    adapter = make_adapter(tmp_path / "adapter", {"wide": (160, 96)}, **fields)
    error = refused(adapter, tmp_path)
    assert isinstance(error, Unsupported)
    assert reason in str(error)
    assert str(adapter) in str(error)
    assert error.hint
    assert way_out in error.hint


OTHER_METHODS = {
    "VERA": lambda: VeraConfig(r=8, target_modules=["wide"]),
    "OFT": lambda: OFTConfig(oft_block_size=8, r=0, target_modules=["wide"]),
    "VBLORA": lambda: VBLoRAConfig(r=4, vector_length=16, target_modules=["wide"]),
    "FOURIERFT": lambda: FourierFTConfig(n_frequency=50, target_modules=["wide"]),
    "RANDLORA": lambda: RandLoraConfig(r=8, target_modules=["wide"]),
    "LN_TUNING": lambda: LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # said of every LayerNorm
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_adapters_of_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"wide": nn.Linear(96, 160), "norm": nn.LayerNorm(160)})
    get_peft_model(model, OTHER_METHODS[method]()).save_pretrained(tmp_path / "adapter")
    error = refused(tmp_path / "adapter", tmp_path, nn.ModuleDict({"wide": nn.Linear(96, 160)}))
    assert isinstance(error, Unsupported)
    assert method in str(error)
    assert error.hint


@pytest.mark.parametrize(
    "method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "MULTITASK_PROMPT_TUNING"]
)
def test_prompts_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tensors = {"prompt_embeddings": np.ones((8, 64), np.float32)}
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_type=method, num_virtual_tokens=8)
    error = refused(adapter, tmp_path)
    assert isinstance(error, Unsupported)
    assert method in str(error)
    assert error.hint


# What PEFT warns of here is what we refuse.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_grouped_convolution_is_refused_by_the_module_name(tmp_path: Path) -> None:
    def grouped() -> nn.Module:
        return nn.ModuleDict({"mix": nn.Conv2d(16, 32, 3, groups=4)})

    config = LoraConfig(r=8, lora_alpha=4, target_modules=["mix"], init_lora_weights=False)
    get_peft_model(grouped(), config).save_pretrained(tmp_path / "adapter")
    error = refused(tmp_path / "adapter", tmp_path, grouped())
    assert isinstance(error, Unsupported)
    assert "mix" in str(error)
    assert "grouped" in str(error)
    assert error.hint


def test_a_trained_bias_without_a_place_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "base_model.model.bare.lora_A.weight": rng.standard_normal((4, 48), np.float32),
        "base_model.model.bare.lora_B.weight": rng.standard_normal((32, 4), np.float32),
        "base_model.model.bare.lora_B.bias": rng.standard_normal(32, np.float32),
    }
    fields = {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["bare"]}
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    error = refused(adapter, tmp_path, nn.ModuleDict({"bare": nn.Linear(48, 32, bias=False)}))
    assert isinstance(error, Mismatch)
    assert "bare" in str(error)
    assert error.hint


def test_a_shape_that_does_not_fit_names_the_module_and_both_shapes(tmp_path: Path) -> None:
    error = refused(make_adapter(tmp_path / "adapter", {"wide": (160, 90)}), tmp_path)
    assert isinstance(error, ShapeMismatch)
    assert str(error).endswith("wide: delta [160, 90] does not fit weight [160, 96]")


def test_a_rank_the_configuration_contradicts_names_the_module(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", {"wide": (160, 96)}, rank=4, r=6)
    error = refused(adapter, tmp_path)
    assert isinstance(error, Mismatch)
    assert "wide has rank 4 in the file and 6 in the configuration" in str(error)
