"""Every setting of a run, as frozen dataclasses that refuse bad values and survive JSON and TOML.

The command line is generated from these classes: a field's docstring is its help text, and
`--model.n_embd 256` sets `TrainConfig().model.n_embd`. A field that is None is derived from the
others by `ModelConfig.resolved()`, so that changing one field never leaves a stale twin behind.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union


class ConfigError(ValueError):
    """A field holds a value it cannot hold; the message names the field, the value and the range."""


# The logical vocabulary is stored in a matrix with this many rows or a multiple of it, so that the
# output projection is a shape that tensor cores like. The extra rows are zero and never seen outside.
VOCAB_MULTIPLE = 128


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- checks and conversion, shared by every class below --------------------------------------


def _require(ok: bool, where: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{where} = {value!r}: expected {expected}")


def _interval(f: dataclasses.Field) -> str:
    """The bound of a field in words: `, at least 1 and at most 10`; empty when it has none."""

    def text(bound: float) -> str:
        return str(bound) if isinstance(bound, int) else f"{bound:g}"

    if "bound" not in f.metadata:
        return ""
    low, high, low_open, high_open = f.metadata["bound"]
    words = f", {'more than' if low_open else 'at least'} {text(low)}"
    return words + (f" and {'less than' if high_open else 'at most'} {text(high)}" if math.isfinite(high) else "")


def _type_name(hint: Any, interval: str = "") -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (Union, types.UnionType):
        words = [_type_name(a, interval) for a in typing.get_args(hint) if a is not type(None)]
        return " or ".join(words) + (" (or nothing)" if type(None) in typing.get_args(hint) else "")
    if origin is tuple:
        return f"a list, each {_type_name(typing.get_args(hint)[0])}"
    name = {
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        bool: "true or false",
    }.get(hint, getattr(hint, "__name__", str(hint)))
    return name + interval


def _near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word is close, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def expected(f: dataclasses.Field, hint: Any) -> str:
    """What field `f` of type `hint` holds, in words: its type and its range."""
    return _type_name(hint, _interval(f))


def check_field(f: dataclasses.Field, hint: Any, value: Any, where: str) -> Any:
    """`value` as field `f` of type `hint` holds it. Raises ConfigError, naming `where`, the value, type and range."""
    value = _coerce(hint, value, where, expected(f, hint))
    if value is not None and "bound" in f.metadata:
        low, high, low_open, high_open = f.metadata["bound"]
        ok = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
        _require(ok, where, value, expected(f, hint))
    return value


def _coerce(hint: Any, value: Any, where: str, expected: str) -> Any:
    """`value` as the type `hint` asks for: dicts become config classes, lists tuples, ints floats."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        arms = typing.get_args(hint)
        if value is None and type(None) in arms:
            return None
        return _coerce(next(a for a in arms if a is not type(None)), value, where, expected)
    if origin is Literal:
        arms = typing.get_args(hint)
        _require(value in arms, where, value, expected + (_near(value, arms) if isinstance(value, str) else ""))
        return value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, value, expected)
        return tuple(_coerce(typing.get_args(hint)[0], v, where, expected) for v in value)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        _require(isinstance(value, dict), where, value, f"a table of {hint.__name__} fields")
        return hint.from_dict(value, where)
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected {expected}; the number is too large") from None
    _require(type(value) is hint, where, value, expected)
    if hint is float:
        _require(math.isfinite(value), where, value, expected)
    return value


def _bound(low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False) -> dict:
    """Field metadata: the interval that `_Config` holds the field to."""
    return {"bound": (low, high, low_open, high_open)}


def _number(default: Any, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False) -> Any:
    return field(default=default, metadata=_bound(low, high, low_open, high_open))


class _Config:
    """Type and range checks on construction; conversion from and to dict, JSON and TOML."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = check_field(f, hints[f.name], getattr(self, f.name), f"{type(self).__name__}.{f.name}")
            object.__setattr__(self, f.name, value)
        self._check()

    def _check(self) -> None:
        """Rules that tie several fields together."""

    @classmethod
    def from_dict(cls, values: dict, where: str = "") -> Any:
        where = where or cls.__name__
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                hint = _near(str(key), names) or f"; its fields are {', '.join(names)}"
                raise ConfigError(f"{where} has no field {key!r}{hint}")
        hints = typing.get_type_hints(cls)
        by_name = {f.name: f for f in dataclasses.fields(cls)}
        return cls(**{k: check_field(by_name[k], hints[k], v, f"{where}.{k}") for k, v in values.items()})

    def to_dict(self) -> dict:
        def plain(value: Any) -> Any:
            if isinstance(value, _Config):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Any:
        return cls.from_dict(_parsed(json.loads, text, "JSON"))

    def to_toml(self) -> str:
        import tomli_w

        def without_none(value: Any) -> Any:  # TOML has no null: a missing key is the default
            return {k: without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

        return tomli_w.dumps(without_none(self.to_dict()))

    @classmethod
    def from_toml(cls, text: str) -> Any:
        return cls.from_dict(_parsed(_parse_toml, text, "TOML"))

    @classmethod
    def load(cls, path: Union[str, Path]) -> Any:
        """Read a .toml or .json file. Raises ConfigError naming the file."""
        values = read_table(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def replace(self, **changes: Any) -> Any:
        return dataclasses.replace(self, **changes)


def _parse_toml(text: str) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _quoted(reason: str, text: str) -> str:
    """`; line 3 is 'steps = = 3'`: the line that a parser complains of, the last one where it reached the end."""
    lines = text.rstrip().split("\n")
    named = re.search(r"\bline (\d+)", reason)
    if not named and "end of document" not in reason:
        return ""
    number = min(int(named[1]) if named else len(lines), len(lines))
    line = lines[number - 1].strip()
    return f"; line {number} is {line if len(line) <= 80 else line[:77] + '...'!r}"


def _parsed(loads: Any, text: str, language: str) -> dict:
    try:
        values = loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid {language}: {error}{_quoted(str(error), text)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r:.60}: expected a table of fields")
    return values


def read_table(path: Union[str, Path]) -> dict:
    """The content of a .json file, or of a .toml file of any other name. Raises ConfigError naming the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the text
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    try:
        return _parsed(json.loads, text, "JSON") if path.suffix == ".json" else _parsed(_parse_toml, text, "TOML")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling(_Config):
    """How rotary frequencies are stretched for a context longer than the one trained on."""

    kind: Literal["linear", "llama3"] = "linear"
    """linear divides every frequency by `factor`; llama3 divides only the slow ones."""
    factor: float = _number(1.0, 1.0)
    """How many times longer the context is."""
    low_freq_factor: float = _number(1.0, 0.0, low_open=True)
    """llama3: wavelengths longer than original_block_size / low_freq_factor are divided in full."""
    high_freq_factor: float = _number(4.0, 0.0, low_open=True)
    """llama3: wavelengths shorter than original_block_size / high_freq_factor are kept."""
    original_block_size: int = _number(8192, 1)
    """llama3: the context that the model was first trained on."""

    def _check(self) -> None:
        if self.kind == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                "RopeScaling.high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor ({self.low_freq_factor:g})",
            )


@dataclass(frozen=True)
class ModelConfig(_Config):
    """The shape of a decoder-only transformer. The defaults are GPT-2 small."""

    vocab_size: int = _number(50257, 1)
    """Token ids run from 0 to vocab_size - 1."""
    block_size: int = _number(1024, 1)
    """Longest sequence, in tokens (T)."""
    n_layer: int = _number(12, 1)
    """Transformer blocks."""
    n_head: int = _number(12, 1)
    """Query heads (H)."""
    n_kv_head: Optional[int] = _number(None, 1)
    """Key and value heads (KV); n_head when not given. Fewer is grouped-query attention."""
    n_embd: int = _number(768, 1)
    """Width of the residual stream (C)."""
    head_dim: Optional[int] = _number(None, 1)
    """Width of one head (D); n_embd / n_head when not given."""
    ffn_width: Optional[int] = _number(None, 1)
    """Width inside the feed-forward block (F); when not given 4 C, or for swiglu 8/3 C rounded up to 64."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Which normalisation."""
    norm_eps: float = _number(1e-5, 0.0, low_open=True)
    """Added to the variance (or mean square) under the root."""
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    """Nonlinearity of the feed-forward block; swiglu has two input projections, packed as one."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned absolute positions (GPT-2) or rotary positions (RoPE)."""
    rope_theta: float = _number(10000.0, 1.0, low_open=True)
    """Base of the rotary frequencies."""
    rope_fraction: float = _number(1.0, 0.0, 1.0, low_open=True)
    """Share of each head's dimensions that is rotated."""
    rope_scaling: Optional[RopeScaling] = None
    """Stretching of the rotary frequencies; none when not given."""
    linear_bias: bool = True
    """Biases in the projections (attention's output and the feed-forward block's)."""
    qkv_bias: Optional[bool] = None
    """Bias in the QKV projection; as linear_bias when not given."""
    norm_bias: Optional[bool] = None
    """Bias in LayerNorm; as linear_bias when not given. RMSNorm has none."""
    tied_embeddings: bool = True
    """Token embedding and output projection share one matrix."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation."""
    window: Optional[int] = _number(None, 0)
    """Sliding window: a token sees itself and this many tokens before it; all when not given."""
    dropout: float = _number(0.0, 0.0, 1.0, high_open=True)
    """Dropout probability. Served by the reference path only: the kernels are dropout-free."""

    def _check(self) -> None:
        head_dim = self.head_dim
        if head_dim is None:
            _require(
                self.n_embd % self.n_head == 0,
                "ModelConfig.n_embd",
                self.n_embd,
                f"a multiple of n_head ({self.n_head}), or head_dim given",
            )
            head_dim = self.n_embd // self.n_head
        kv = self.n_kv_head or self.n_head
        _require(self.n_head % kv == 0, "ModelConfig.n_kv_head", kv, f"a divisor of n_head ({self.n_head})")
        if self.positions == "rope":
            rotated = self.rope_fraction * head_dim
            _require(
                rotated == int(rotated) and int(rotated) % 2 == 0,
                "ModelConfig.rope_fraction",
                self.rope_fraction,
                f"a share of head_dim ({head_dim}) that is an even whole number",
            )
        if self.norm == "rmsnorm":
            _require(not self.norm_bias, "ModelConfig.norm_bias", self.norm_bias, "false: RMSNorm has no bias")

    def resolved(self) -> ModelConfig:
        """The same model with every derived field filled in."""
        ffn = self.ffn_width or (round_up(8 * self.n_embd // 3, 64) if self.activation == "swiglu" else 4 * self.n_embd)
        return self.replace(
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            ffn_width=ffn,
            qkv_bias=self.linear_bias if self.qkv_bias is None else self.qkv_bias,
            norm_bias=self.norm == "layernorm" and (self.linear_bias if self.norm_bias is None else self.norm_bias),
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the stored embedding matrix."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named shape (see PRESETS), with fields changed as asked. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}{_near(name, PRESETS)} (there are {', '.join(PRESETS)})")
        return cls(**{**PRESETS[name], **changes})


_LLAMA = dict(
    norm="rmsnorm",
    activation="swiglu",
    positions="rope",
    linear_bias=False,
    tied_embeddings=False,
)
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "llama-1b": dict(
        _LLAMA,
        vocab_size=128256,
        block_size=8192,
        n_layer=16,
        n_head=32,
        n_kv_head=8,
        n_embd=2048,
        ffn_width=8192,
        rope_theta=500000.0,
        tied_embeddings=True,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
    ),
    "llama-8b": dict(
        _LLAMA,
        vocab_size=128256,
        block_size=8192,
        n_layer=32,
        n_head=32,
        n_kv_head=8,
        n_embd=4096,
        ffn_width=14336,
        rope_theta=500000.0,
    ),
    "small": dict(_LLAMA, vocab_size=8192, block_size=512, n_layer=8, n_head=8, n_embd=512, tied_embeddings=True),
    "tiny": dict(_LLAMA, vocab_size=4096, block_size=256, n_layer=4, n_head=4, n_embd=128, tied_embeddings=True),
}


# ---- training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig(_Config):
    """Where the tokens are and how they are cut into samples."""

    path: str = "data"
    """Folder with dataset.json and the shards, as written by `fastgpt prepare`."""
    documents: bool = False
    """Keep attention and positions inside one document, which begins at its `<|endoftext|>`."""


@dataclass(frozen=True)
class OptimConfig(_Config):
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything; or muon for the hidden matrices and adamw for the rest."""
    lr: float = _number(6e-4, 0.0)
    """Peak learning rate of AdamW."""
    muon_lr: float = _number(0.02, 0.0)
    """Peak learning rate of Muon's matrices."""
    muon_momentum: float = _number(0.95, 0.0, 1.0, high_open=True)
    """Momentum of Muon (Nesterov)."""
    beta1: float = _number(0.9, 0.0, 1.0, high_open=True)
    """AdamW: decay of the gradient's running mean."""
    beta2: float = _number(0.95, 0.0, 1.0, high_open=True)
    """AdamW: decay of the squared gradient's running mean."""
    eps: float = _number(1e-8, 0.0, low_open=True)
    """AdamW: added to the root of the second moment."""
    weight_decay: float = _number(0.1, 0.0)
    """Decoupled decay, on matrices only."""
    grad_clip: float = _number(1.0, 0.0)
    """Largest norm of the whole gradient; 0 turns clipping off."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to the end; warm-up, stable, linear decay (wsd); or constant."""
    warmup_steps: int = _number(100, 0)
    """Steps of linear warm-up; the first step already moves."""
    decay_fraction: float = _number(0.2, 0.0, 1.0)
    """wsd: share of all steps that the final decay takes."""
    min_lr_fraction: float = _number(0.1, 0.0, 1.0)
    """The learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class EvalConfig(_Config):
    """Evaluation on the validation split."""

    every: int = _number(500, 0)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: int = _number(0, 0)
    """Batches an evaluation reads; 0 reads the whole split."""
    batch_size: int = _number(16, 1)
    """Sequences in one evaluation batch."""


@dataclass(frozen=True)
class CheckpointConfig(_Config):
    """What is kept on disk."""

    every: int = _number(500, 0)
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    keep_last: int = _number(2, 1)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


@dataclass(frozen=True)
class TrainConfig(_Config):
    """One training run. `fastgpt train --print-config` shows it whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokens."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    out_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics.jsonl, config.toml."""
    steps: int = _number(5000, 0)
    """Optimizer steps in the whole run. A run that has ended goes on where it is resumed with more: the learning rate
    then follows the schedule of the longer run."""
    batch_tokens: int = _number(524288, 1)
    """Tokens per optimizer step over all micro-batches: a multiple of micro_batch_size * block_size."""
    micro_batch_size: int = _number(16, 1)
    """Sequences that go through the model at once; gradients are accumulated up to batch_tokens."""
    seed: int = _number(1337, 0, 2**63 - 1)
    """Of the initialisation, the order of the batches and dropout."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_stochastic"] = "auto"
    """bfloat16: bf16 parameters beside an fp32 master; bfloat16_stochastic: bf16 alone, rounded
    stochastically; auto: on a CPU whichever of float32 and bfloat16 steps faster, bfloat16 on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    cuda_graphs: bool = True
    """On a GPU with kernels for every op: record a step as CUDA graphs once and replay them. They keep the memory that
    a micro-batch needs; an evaluation takes its own besides. Off: launch each kernel by itself."""
    log_every: int = _number(10, 1)
    """Steps between lines in metrics.jsonl (and on a stdout that is no terminal)."""
    max_bad_steps: int = _number(10, 1)
    """Stop after this many steps in a row whose loss or gradient is not finite."""

    def _check(self) -> None:
        row = self.micro_batch_size * self.model.block_size
        if self.batch_tokens % row:
            nearest = max(1, round(self.batch_tokens / row)) * row
            raise ConfigError(
                f"TrainConfig.batch_tokens = {self.batch_tokens}: expected a multiple of micro_batch_size * "
                f"block_size ({self.micro_batch_size} * {self.model.block_size}); the nearest is {nearest}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step."""
        return self.batch_tokens // (self.micro_batch_size * self.model.block_size)


@dataclass(frozen=True)
class PrepareConfig(_Config):
    """Text in, shards of token ids out."""

    inputs: tuple[str, ...] = ()
    """Files and folders: .txt, .jsonl(.gz|.zst), .parquet, and source code."""
    out_dir: str = "data"
    """Folder for dataset.json, tokenizer.json and the shards."""
    overwrite: bool = False
    """Remove the dataset that prepare wrote to out_dir before, and prepare anew."""
    val_inputs: tuple[str, ...] = ()
    """Files and folders of the validation split; when not given, val_fraction of the documents."""
    val_fraction: float = _number(0.01, 0.0, 1.0, high_open=True)
    """Share of the documents (chosen by their hash) that becomes the validation split."""
    tokenizer: str = "train"
    """`train` to train one on the inputs, a tokenizer.json, or a name: gpt2, o200k_base."""
    vocab_size: int = _number(8192, 257)
    """Size of the vocabulary when the tokenizer is trained, `<|endoftext|>` included."""
    text_field: str = "text"
    """The field (.jsonl) or column (.parquet) that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: refuse with the byte offset, or replace with U+FFFD and count."""
    shard_tokens: int = _number(100_000_000, 1)
    """Tokens in one shard file."""
    workers: int = _number(0, 0)
    """Processes that encode; 0 takes one per core."""
