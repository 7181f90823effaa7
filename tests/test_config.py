"""The configuration: what it refuses and in which words, its round trips, its presets."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config import (
    PRESETS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    RopeScaling,
    TrainConfig,
    read_table,
)

CLASSES = [
    RopeScaling,
    ModelConfig,
    DataConfig,
    OptimConfig,
    EvalConfig,
    CheckpointConfig,
    TrainConfig,
    PrepareConfig,
]


def refusal(call) -> str:
    with pytest.raises(ConfigError) as info:
        call()
    text = str(info.value)
    assert "\n" not in text
    return text


# ---- round trips ---------------------------------------------------------------------------------


def changed() -> TrainConfig:
    """A configuration that differs from the defaults in every section."""
    model = ModelConfig.preset("llama-1b", window=128, dropout=0.25, qk_norm=True, head_dim=80)
    return TrainConfig(
        model=model,
        data=DataConfig(path='a "quoted" path\\with\nnews: ü 中', documents=True),
        optim=OptimConfig(optimizer="muon", lr=1e-300, eps=1.2345678901234567e-8, schedule="wsd"),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(keep_best=False),
        seed=2**63 - 1,
        batch_tokens=8192 * 16 * 3,
    )


@pytest.mark.parametrize("config", [c() for c in CLASSES] + [changed()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("language", ["json", "toml", "dict"])
def test_round_trips_are_exact(config, language):
    cls = type(config)
    text = getattr(config, f"to_{language}")()
    again = getattr(cls, f"from_{language}")(text)
    assert again == config
    assert getattr(again, f"to_{language}")() == text


def strategy(f: dataclasses.Field, cls: type):
    default = getattr(cls(), f.name)
    low, high, low_open, high_open = f.metadata.get("bound", (None, None, False, False))
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(low, None if high == math.inf else high)
    if isinstance(default, float):
        high = None if high == math.inf else high
        return st.floats(
            low, high, exclude_min=low_open, exclude_max=high_open, allow_nan=False, allow_infinity=False
        ).filter(lambda x: x != math.inf)
    if isinstance(default, str) and f.type == "str":
        return st.text(st.characters(exclude_categories=("Cs",)))
    if isinstance(default, tuple):
        return st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=3).map(tuple)
    return st.just(default)


@pytest.mark.parametrize("cls", [OptimConfig, EvalConfig, CheckpointConfig, DataConfig, PrepareConfig])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_values_survive_json_and_toml(cls, data):
    config = cls(**{f.name: data.draw(strategy(f, cls), label=f.name) for f in dataclasses.fields(cls)})
    assert cls.from_json(config.to_json()) == config
    assert cls.from_toml(config.to_toml()) == config


def test_a_table_names_only_what_differs():
    config = TrainConfig.from_toml("steps = 7\n[optim]\nlr = 1\n[model.rope_scaling]\nfactor = 2\n")
    assert config == TrainConfig(
        steps=7, optim=OptimConfig(lr=1.0), model=ModelConfig(rope_scaling=RopeScaling(factor=2.0))
    )
    assert type(config.optim.lr) is float


def test_none_survives_json_and_is_left_out_of_toml():
    assert json.loads(ModelConfig().to_json())["n_kv_head"] is None
    assert "n_kv_head" not in ModelConfig().to_toml()


def test_it_is_frozen_and_hashable_where_its_fields_are():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    assert hash(config) == hash(TrainConfig())
    assert config.replace(steps=3).steps == 3 and config.steps == TrainConfig().steps


# ---- files ---------------------------------------------------------------------------------------


def test_files_are_read_by_their_suffix(tmp_path):
    config = changed()
    (tmp_path / "a.toml").write_text(config.to_toml(), encoding="utf-8")
    (tmp_path / "a.json").write_text(config.to_json(), encoding="utf-8")
    assert TrainConfig.load(tmp_path / "a.toml") == TrainConfig.load(str(tmp_path / "a.json")) == config


def test_a_byte_order_mark_and_crlf_are_no_obstacle(tmp_path):
    file = tmp_path / "windows.toml"
    file.write_bytes(b"\xef\xbb\xbfsteps = 3\r\n[eval]\r\nevery = 4\r\n")
    assert TrainConfig.load(file) == TrainConfig(steps=3, eval=EvalConfig(every=4))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.toml", None, "cannot read the configuration"),
        ("a.toml", b"steps = = 3", "not valid TOML: Invalid value (at line 1, column 9); line 1 is 'steps = = 3'"),
        ("a.toml", b"seed = 1\r\n[optim]\r\n  lr 3\r\n", "; line 3 is 'lr 3'"),
        ("a.toml", b"steps = 3\ninputs = [\n  'a'\n\n", "; line 3 is \"'a'\""),  # never closed
        ("a.toml", b"x = " + b"1 " * 1000, "; line 1 is 'x = 1 1 1 1"),
        ("a.json", b"{steps: 3}", "not valid JSON"),
        ("a.json", b'{"seed": 1,\n "steps": }', "; line 2 is '\"steps\": }'"),
        ("a.json", b"[1, 2]", "expected a table of fields"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.toml", b"\xff\xfe", "cannot read the configuration"),
        ("a.toml", b"stepz = 3", "did you mean 'steps'?"),
        ("a.toml", b"[optim]\nlr = -1", "optim.lr = -1.0: expected a finite number, at least 0"),
        ("a.json", b'{"optim": {"lr": NaN}}', "optim.lr = nan: expected a finite number"),
        ("a.json", b'{"steps": null}', "steps = None: expected a whole number"),
        ("a.json", b'{"model": 3}', "model = 3: expected a table of ModelConfig fields"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = refusal(lambda: TrainConfig.load(tmp_path / name))
    assert words in text and name in text
    assert len(text) < 400 + len(str(tmp_path))


def test_a_folder_is_not_a_file(tmp_path):
    assert str(tmp_path) in refusal(lambda: read_table(tmp_path))


# ---- refusals --------------------------------------------------------------------------------------

REFUSED = [
    # type
    (lambda: ModelConfig(n_embd="768"), "ModelConfig.n_embd = '768': expected a whole number, at least 1"),
    (lambda: ModelConfig(n_embd=768.0), "ModelConfig.n_embd = 768.0: expected a whole number"),
    (lambda: ModelConfig(n_layer=True), "ModelConfig.n_layer = True: expected a whole number"),
    (lambda: ModelConfig(linear_bias=1), "ModelConfig.linear_bias = 1: expected true or false"),
    (lambda: OptimConfig(lr="fast"), "OptimConfig.lr = 'fast': expected a finite number, at least 0"),
    (lambda: OptimConfig(lr=False), "OptimConfig.lr = False: expected a finite number"),
    (lambda: DataConfig(path=3), "DataConfig.path = 3: expected a text"),
    (lambda: PrepareConfig(inputs="a.txt"), "PrepareConfig.inputs = 'a.txt': expected a list, each a text"),
    (lambda: PrepareConfig(inputs=(1,)), "PrepareConfig.inputs = 1: expected a list, each a text"),
    (lambda: ModelConfig(n_kv_head="x"), "n_kv_head = 'x': expected a whole number, at least 1 (or nothing)"),
    (lambda: TrainConfig(model=[]), "TrainConfig.model = []: expected a table of ModelConfig fields"),
    # choice
    (lambda: ModelConfig(norm="layernrm"), "expected one of layernorm, rmsnorm; did you mean 'layernorm'?"),
    (lambda: ModelConfig(norm=["layernorm"]), "expected one of layernorm, rmsnorm"),
    (lambda: OptimConfig(schedule="zzz"), "OptimConfig.schedule = 'zzz': expected one of cosine, wsd, constant"),
    # range
    (lambda: ModelConfig(n_embd=-1), "ModelConfig.n_embd = -1: expected a whole number, at least 1"),
    (
        lambda: ModelConfig(dropout=1.0),
        "ModelConfig.dropout = 1.0: expected a finite number, at least 0 and less than 1",
    ),
    (lambda: ModelConfig(norm_eps=0.0), "ModelConfig.norm_eps = 0.0: expected a finite number, more than 0"),
    (lambda: OptimConfig(lr=math.nan), "OptimConfig.lr = nan: expected a finite number"),
    (lambda: OptimConfig(lr=math.inf), "OptimConfig.lr = inf: expected a finite number"),
    (lambda: OptimConfig(lr=10**400), "OptimConfig.lr: expected a finite number, at least 0; the number is too large"),
    (lambda: TrainConfig(seed=2**63), "at least 0 and at most 9223372036854775807"),
    (lambda: PrepareConfig(vocab_size=256), "PrepareConfig.vocab_size = 256: expected a whole number, at least 257"),
    # several fields
    (
        lambda: ModelConfig(n_embd=770),
        "ModelConfig.n_embd = 770: expected a multiple of n_head (12), or head_dim given",
    ),
    (lambda: ModelConfig(n_kv_head=5), "ModelConfig.n_kv_head = 5: expected a divisor of n_head (12)"),
    (
        lambda: ModelConfig(positions="rope", rope_fraction=0.3),
        "ModelConfig.rope_fraction = 0.3: expected a share of head_dim (64) that is an even whole number",
    ),
    (lambda: ModelConfig(norm="rmsnorm", norm_bias=True), "expected false: RMSNorm has no bias"),
    (
        lambda: RopeScaling(kind="llama3", low_freq_factor=4.0),
        "RopeScaling.high_freq_factor = 4.0: expected more than low_freq_factor (4)",
    ),
    (
        lambda: TrainConfig(batch_tokens=50_000),
        "TrainConfig.batch_tokens = 50000: expected a multiple of micro_batch_size * block_size (16 * 1024); "
        "the nearest is 49152",
    ),
    (lambda: TrainConfig(batch_tokens=1), "the nearest is 16384"),
    # names
    (lambda: ModelConfig.from_dict({"n_embed": 3}), "ModelConfig has no field 'n_embed'; did you mean 'n_embd'?"),
    (lambda: DataConfig.from_dict({"zzz": 3}), "DataConfig has no field 'zzz'; its fields are path, documents"),
    (lambda: TrainConfig.from_dict({"model": {"n_hed": 3}}), "TrainConfig.model has no field 'n_hed'; did you mean"),
    (lambda: ModelConfig.preset("gpt"), "no preset 'gpt'; did you mean 'gpt2'? (there are gpt2, gpt2-medium"),
    (lambda: ModelConfig.preset("zzz"), "no preset 'zzz' (there are gpt2, gpt2-medium"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_refusals_name_the_field_the_value_and_the_range(call, words):
    assert words in refusal(call)


def bounded() -> list:
    return [(cls, f) for cls in CLASSES for f in dataclasses.fields(cls) if "bound" in f.metadata]


@pytest.mark.parametrize(("cls", "f"), bounded(), ids=lambda x: x.name if isinstance(x, dataclasses.Field) else "")
def test_every_bound_is_held(cls, f):
    low, high, low_open, high_open = f.metadata["bound"]
    number = int if "int" in f.type else float
    outside = [low if low_open else low - 1] + ([high if high_open else high + 1] if math.isfinite(high) else [])
    for value in outside:
        assert f"{cls.__name__}.{f.name} = " in refusal(lambda value=value: cls(**{f.name: number(value)}))


def test_every_number_has_a_range():
    """A number that may be anything was forgotten."""
    for cls in CLASSES:
        for f in dataclasses.fields(cls):
            if f.type in ("int", "float", "Optional[int]", "Optional[float]"):
                assert "bound" in f.metadata, f"{cls.__name__}.{f.name}"


# ---- what follows from the fields --------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_can_be_changed(name):
    config = ModelConfig.preset(name)
    assert config == ModelConfig(**PRESETS[name])
    assert ModelConfig.preset(name, n_layer=3) == config.replace(n_layer=3)
    full = config.resolved()
    assert full.resolved() == full
    assert None not in (full.n_kv_head, full.head_dim, full.ffn_width, full.qkv_bias, full.norm_bias)


def test_derived_fields():
    plain = ModelConfig().resolved()
    assert (plain.n_kv_head, plain.head_dim, plain.ffn_width) == (12, 64, 3072)
    assert plain.qkv_bias and plain.norm_bias
    gated = ModelConfig.preset("tiny").resolved()
    assert gated.ffn_width == 384  # 8/3 * 128 = 341.3, rounded up to 64
    assert not gated.qkv_bias and not gated.norm_bias
    # a derived field follows when what it is derived from changes
    assert ModelConfig(n_embd=96).resolved().head_dim == 8


def test_the_vocabulary_is_stored_in_a_multiple():
    assert ModelConfig().padded_vocab_size == 50304
    assert ModelConfig(vocab_size=128).padded_vocab_size == 128
    assert ModelConfig(vocab_size=1).padded_vocab_size == 128


def test_accumulation_counts_the_micro_batches():
    assert TrainConfig(batch_tokens=16 * 1024 * 3).accumulation == 3
