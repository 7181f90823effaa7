"""Checkpoints on disk: exact round trips, damage found, strangers refused. Kills and full disks: test_chaos.py."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastgpt import checkpoint as ckpt
from fastgpt.cli import main
from fastgpt.config import OptimConfig
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.optim import build_optimizer
from fastgpt.precision import apply_precision
from tests.synthetic import byte_tokenizer
from tests.test_optim import TINY, assert_same_tree


def trained(precision: str = "float32", kind: str = "muon", steps: int = 2):
    model = apply_precision(GPT(TINY, torch.Generator().manual_seed(0)), precision)
    stochastic = precision == "bfloat16_stochastic"
    optimizer = build_optimizer(model, OptimConfig(optimizer=kind), stochastic_rounding=stochastic)
    for step in range(steps):
        idx = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(step))
        model(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(run_dir, step=1, model=None, optimizer=None):
    if model is None:
        model, optimizer = trained()
    config = {"model": TINY.to_dict()}
    return ckpt.save(run_dir, step, *ckpt.training_tensors(model, optimizer), {"config": config})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_round_trip_is_bitwise(tmp_path, precision, kind):
    model, optimizer = trained(precision, kind)
    path = write(tmp_path, 7, model, optimizer)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    other, its_optimizer = trained(precision, kind, steps=0)
    ckpt.load_training_tensors(other, its_optimizer, ckpt.load(path))
    assert_same_tree(
        (other.state_dict(), its_optimizer.state_dict()["state"]), (model.state_dict(), optimizer.state_dict()["state"])
    )


def test_a_bf16_run_is_saved_as_its_masters_without_padding(tmp_path):
    model, optimizer = trained("bfloat16")
    saved = ckpt.load(write(tmp_path, 1, model, optimizer))
    assert {t.dtype for t in saved.weights.values()} == {torch.float32}
    assert saved.weights["token_embedding.weight"].shape == (50, 16)
    assert saved.optimizer["token_embedding.weight/exp_avg"].shape == (50, 16)
    assert not any(key.endswith("/master") for key in saved.optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.weights[name].to(torch.bfloat16)), name


def test_load_model_gives_the_trained_weights(tmp_path):
    model, optimizer = trained("bfloat16")
    write(tmp_path, 3, model, optimizer)
    loaded, tokenizer = ckpt.load_model(tmp_path)
    assert tokenizer is None and loaded.config == model.config and not loaded.training
    assert torch.equal(loaded.final_norm.weight, optimizer.state[model.final_norm.weight]["master"])


@pytest.mark.parametrize("file", [ckpt.MODEL, ckpt.OPTIMIZER, ckpt.STATE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_damage_is_found_and_the_one_before_is_used_loudly(tmp_path, file, damage):
    model, optimizer = trained()
    write(tmp_path, 1, model, optimizer)
    newest = write(tmp_path, 2, model, optimizer)
    victim = newest / file
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "truncate":
        content = content[:-3]
    elif damage == "empty":
        content = b""
    victim.unlink() if damage == "missing" else victim.write_bytes(content)

    for named in (ckpt.load, ckpt.resolve):  # by the user: no fallback
        with pytest.raises(UserError, match=file if file != ckpt.STATE or damage != "missing" else "not a checkpoint"):
            named(newest)
    warnings = []
    assert ckpt.latest(tmp_path, warnings.append).state["step"] == 1
    assert len(warnings) == 1 and str(newest) in warnings[0]
    assert ckpt.latest(tmp_path, warnings.append).state["step"] == 1
    assert newest.exists(), "reading changes nothing"
    keeper = ckpt.Keeper(tmp_path, 2, pytest.fail)
    keeper.tidy(1)
    assert [p.name for p in ckpt.steps_on_disk(tmp_path)] == ["step-00000001"]
    assert (newest.parent / "damaged-step-00000002").exists()
    assert keeper.save(2, {"x": torch.zeros(1)}, {}, {}, None)


def test_all_damaged_is_refused(tmp_path):
    (write(tmp_path) / ckpt.MODEL).write_bytes(b"")
    for _ in range(2):  # and it stays refused
        with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
            ckpt.latest(tmp_path, lambda _: None)


def test_another_format_is_refused_and_left_alone(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    state = json.loads((path / ckpt.STATE).read_text())
    state.pop("state_sha256")
    state["format"] = 99
    (path / ckpt.STATE).write_text(json.dumps({**state, "state_sha256": ckpt._digest(state)}))
    with pytest.raises(UserError, match="checkpoint format 99, this version reads 1"):
        ckpt.latest(tmp_path, pytest.fail)


def test_what_a_kill_left_half_done_is_removed(tmp_path):
    write(tmp_path, 1)
    for name in (".saving-step-00000002", ".deleting-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
    ckpt.Keeper(tmp_path, 2, pytest.fail).tidy(1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_state_of_another_optimizer_is_refused_unless_asked_for(tmp_path):
    saved = ckpt.load(write(tmp_path, 1, *trained(kind="adamw")))
    model, optimizer = trained(kind="muon", steps=0)
    with pytest.raises(UserError, match=r"missing blocks.0.attention.out.weight/momentum_buffer.*extra .*/exp_avg"):
        ckpt.load_training_tensors(model, optimizer, saved)
    ckpt.load_training_tensors(model, optimizer, saved, other_optimizer=True)
    idx = torch.zeros(1, 8, dtype=torch.int64)
    model(idx, idx).backward()
    optimizer.step()


def test_missing_extra_and_misshapen_keys_are_listed(tmp_path):
    model, _ = trained()
    weights = dict(model.state_dict())
    weights["extra.weight"] = weights.pop("final_norm.bias")
    weights["final_norm.weight"] = torch.ones(3)
    with pytest.raises(UserError) as error:
        ckpt.load_weights(model, weights, "file")
    assert "missing final_norm.bias" in str(error.value)
    assert "extra extra.weight" in str(error.value)
    assert "shape final_norm.weight (3,), expected (16,)" in str(error.value)


# ---- strangers -----------------------------------------------------------------------------------


def resealed(path: Path, **changes) -> None:
    """state.json of a checkpoint written again with checksums that fit what its files now hold: damage that looks
    intended."""
    state = json.loads((path / ckpt.STATE).read_text())
    state.pop("state_sha256")
    state |= {"sha256": {name: ckpt._sha256(path / name) for name in (ckpt.MODEL, ckpt.OPTIMIZER)}, **changes}
    (path / ckpt.STATE).write_text(json.dumps({**state, "state_sha256": ckpt._digest(state)}))


def pickles(exploded: Path) -> dict[str, bytes]:
    """A payload in every wrapping that something might unpickle."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(exploded), "w"))

    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"x": Bomb()}, archive)
    torch.save({"x": Bomb()}, legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.save(array, np.array([Bomb()], dtype=object), allow_pickle=True)
    return {"plain": pickle.dumps(Bomb()), "zip": archive.getvalue(), "old": legacy.getvalue(), "npy": array.getvalue()}


@pytest.mark.parametrize("kind", ["plain", "zip", "old", "npy"])
def test_a_pickle_is_refused_and_never_runs(tmp_path, kind, capsys):
    """In the place of every file of a run, with checksums that fit, too; and named as the checkpoint itself."""
    content = pickles(tmp_path / "exploded")[kind]
    run = tmp_path / "run"
    path = write(run)
    byte_tokenizer().save(run / "tokenizer.json")
    ckpt.load_model(run)
    for file in (path / ckpt.MODEL, path / ckpt.OPTIMIZER, path / ckpt.STATE, run / "tokenizer.json"):
        before = {f: f.read_bytes() for f in (file, path / ckpt.STATE)}
        file.write_bytes(content)
        for seal in (False, True):
            if seal and file.name in (ckpt.MODEL, ckpt.OPTIMIZER):
                resealed(path)
            with pytest.raises(UserError):
                ckpt.load(path)
                ckpt.load_model(run)
        for f, was in before.items():
            f.write_bytes(was)
    ckpt.load_model(run)
    for name in ("model.pt", "model.safetensors", "step-00000001"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            ckpt.resolve(tmp_path / name)
        assert main(["sample", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "exploded").exists()


def header(entries: dict | bytes, length: int | None = None, data: int = 64) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "huge": header({"a": entry(0, 64, [16])}, length=2**62),
    "longer than the file": header({"a": entry(0, 64, [16])}, length=4096),
    "not JSON": header(b"{" * 100),
    "deep": header(b'{"a":' * 50_000),
    "overlapping": header({"a": entry(0, 64, [16]), "b": entry(32, 64, [8])}),
    "a hole": header({"a": entry(0, 16, [4]), "b": entry(32, 64, [8])}),
    "past the end": header({"a": entry(0, 1 << 40, [1 << 38])}),
    "more data than entries": header({"a": entry(0, 32, [8])}),
    "overflowing shape": header({"a": entry(0, 64, [2**62, 2**62])}),
    "another size": header({"a": entry(0, 64, [3])}),
    "unknown dtype": header({"a": entry(0, 64, [16], "F31")}),
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,64]}}'),
    "cut": header({"a": entry(0, 64, [16])})[:40],
    "seven bytes": bytes(7),
}


@pytest.mark.parametrize("file", [ckpt.MODEL, ckpt.OPTIMIZER])
@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, kind, file):
    path = write(tmp_path)
    (path / file).write_bytes(HEADERS[kind])
    resealed(path)
    with pytest.raises(UserError, match=file):
        ckpt.load(path)


def test_strange_keys_of_either_file_are_listed(tmp_path):
    path = write(tmp_path)
    found = ckpt.load(path)
    model, optimizer = trained(steps=0)
    fresh = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for tensors, name in ((found.weights, ckpt.MODEL), (found.optimizer, ckpt.OPTIMIZER)):
        keys = sorted(tensors)
        strange = {**tensors, "stranger": torch.zeros(2), keys[1]: torch.zeros(1, 2, 3)}
        gone = [strange.pop(keys[0]), strange.pop(keys[-1])]
        assert len(gone) == 2
        save_file(strange, path / name)
        resealed(path)
        with pytest.raises(UserError) as error:
            ckpt.load_training_tensors(model, optimizer, ckpt.load(path))
        said = str(error.value)
        assert f"{name} does not fit the model: missing {keys[0]}, {keys[-1]}; extra stranger; " in said
        assert f"shape {keys[1]} (1, 2, 3), expected {tuple(tensors[keys[1]].shape)}" in said
        save_file({key: value.long() for key, value in tensors.items()}, path / name)
        resealed(path)
        with pytest.raises(UserError, match=f"no floating point {keys[0]}.* and {len(keys) - 8} more"):
            ckpt.load_training_tensors(model, optimizer, ckpt.load(path))
        save_file(tensors, path / name)
    assert_same_tree(optimizer.state_dict(), fresh[1])
    save_file({}, path / ckpt.OPTIMIZER)
    resealed(path)
    with pytest.raises(UserError, match="missing .* more$"):
        ckpt.load_training_tensors(model, optimizer, ckpt.load(path))


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """A run with a checkpoint of a very small model, a tokenizer and metrics."""
    run = tmp_path_factory.mktemp("intact")
    write(run)
    byte_tokenizer().save(run / "tokenizer.json")
    return run


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_read_right(intact, data):
    """Cut anywhere, bits flipped anywhere, bytes taken out, put in or lost: never garbage, never anything but a
    UserError."""
    path = ckpt.steps_on_disk(intact)[0]
    expected = _loaded(intact, path)
    file = path / data.draw(st.sampled_from([ckpt.MODEL, ckpt.OPTIMIZER, ckpt.STATE]))
    whole = file.read_bytes()
    # half of the damage is done near the beginning, where the header is
    at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, min(len(whole) - 1, 200)))
    kind = data.draw(st.sampled_from(["cut", "flip", "flips", "remove", "insert", "zeros", "append"]))
    damaged = bytearray(whole)
    if kind == "cut":
        del damaged[at:]
    elif kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 9):
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
            at = data.draw(st.integers(0, len(whole) - 1))
    elif kind == "remove":
        del damaged[at : at + data.draw(st.integers(1, 64))]
    elif kind == "insert":
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "zeros":
        damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    else:
        damaged += data.draw(st.binary(min_size=1, max_size=8))
    try:
        file.write_bytes(damaged)
        for seal in (False, True) if file.name != ckpt.STATE else (False,):
            state = (path / ckpt.STATE).read_bytes()
            try:
                if seal:  # behind the checksum's back: whatever comes out must fit, or be refused
                    resealed(path)
                found = _loaded(intact, path)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
            else:
                if not seal:
                    assert_same_tree(found, expected)
            finally:
                (path / ckpt.STATE).write_bytes(state)
    finally:
        file.write_bytes(whole)


def test_every_flipped_bit_of_the_state_is_found(intact):
    """And every place where it may be cut. White space alone says the same."""
    path = ckpt.steps_on_disk(intact)[0]
    file, expected = path / ckpt.STATE, ckpt.read_state(path)
    whole = file.read_bytes()
    damages = [(whole[:at], "cut") for at in range(len(whole) - 1)]
    damages += [
        (whole[:at] + bytes([byte ^ (1 << bit)]) + whole[at + 1 :], f"bit {bit} of byte {at}")
        for at, byte in enumerate(whole)
        for bit in range(8)
    ]
    accepted = 0
    try:
        for damaged, what in damages:
            file.write_bytes(damaged)
            try:
                assert ckpt.read_state(path) == expected, what
                accepted += 1
            except UserError:
                pass
    finally:
        file.write_bytes(whole)
    assert accepted < len(damages) // 10


def _loaded(run: Path, path: Path) -> tuple:
    found = ckpt.load(path)
    model, optimizer = trained(steps=0)
    ckpt.load_training_tensors(model, optimizer, found)
    return found.state, found.weights, found.optimizer, model.state_dict(), optimizer.state_dict()


# ---- the keeper ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16_stochastic"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_space_that_a_checkpoint_needs_is_known(tmp_path, precision, kind, monkeypatch):
    model, optimizer = trained(precision, kind)
    saved = ckpt.load(write(tmp_path, 1, model, optimizer))
    tensors = [*saved.weights.values(), *(t for t in saved.optimizer.values() if t.dim())]
    fresh = trained(precision, kind, steps=0)
    needed = ckpt.checkpoint_bytes(*fresh)
    assert needed == sum(t.numel() * t.element_size() for t in tensors)
    warnings = []
    keeper = ckpt.Keeper(tmp_path, 2, warnings.append)
    for free, times in ((3 * needed, 0), (3 * needed - 1, 1)):  # of the four at a time one is there
        monkeypatch.setattr(ckpt, "disk_free", lambda path, free=free: free)
        keeper.check_space(*fresh, keep_best=True)
        assert len(warnings) == times


def test_a_checkpoint_damaged_twice_is_set_aside_twice(tmp_path):
    for _ in range(2):
        (write(tmp_path, 2) / ckpt.MODEL).write_bytes(b"")
        ckpt.Keeper(tmp_path, 2, pytest.fail).tidy(1)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["damaged-step-00000002"]


def test_the_keeper_warns_twice_and_gives_up_the_third_time(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    warnings = []
    keeper = ckpt.Keeper(tmp_path, 2, warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save", full)
        assert not keeper.save(10, {}, {}, {}, None) and keeper.retry_at == 30
        assert not keeper.save(30, {}, {}, {}, None)
        with pytest.raises(UserError, match="3 times in a row; make room and resume"):
            keeper.save(50, {}, {}, {}, None)
    assert len(warnings) == 2 and "No space left on device" in warnings[0]
    assert warnings[0].endswith("; it is tried again at step 30"), "no older one is promised that is not there"


def test_a_save_that_failed_is_promised_for_no_step_beyond_the_end(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    warnings = []
    keeper = ckpt.Keeper(tmp_path, 2, warnings.append, last_step=15)
    keeper.save(5, {"x": torch.zeros(1)}, {}, {}, None)
    monkeypatch.setattr(ckpt, "save", full)
    assert not keeper.save(10, {}, {}, {}, None) and keeper.retry_at == 15
    assert not keeper.save(12, {}, {}, {}, None, leaving=True)  # a signal came
    with pytest.raises(UserError, match=r"3 times in a row; make room and resume, from step-00000005$"):
        keeper.save(12, {}, {}, {}, None, leaving=True)
    assert [line.partition("; ")[2] for line in warnings] == [
        "the older ones are kept, and it is tried again at step 15",
        "the older ones are kept, and it is tried again in 1 s",
    ]


def test_the_newest_and_the_best_are_kept(tmp_path):
    keeper = ckpt.Keeper(tmp_path, 2, pytest.fail)
    tensor = {"x": torch.zeros(1)}
    for step in range(1, 7):
        assert keeper.save(step, tensor, tensor, {}, best_step=min(step, 2))
    assert [int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path)] == [2, 5, 6]


def test_the_best_on_the_disk_is_kept_until_a_better_one_is_there(tmp_path, monkeypatch):
    """Step 3 is better than step 2, but cannot be saved."""
    keeper = ckpt.Keeper(tmp_path, 1, lambda message: None)
    tensor = {"x": torch.zeros(1)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for step, best in ((1, 1), (2, 2)):
        assert keeper.save(step, tensor, tensor, {}, best)
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save", full)
        assert not keeper.save(3, tensor, tensor, {}, 3)
    assert keeper.save(4, tensor, tensor, {}, 3)
    assert [int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path)] == [2, 4]
    resumed = ckpt.Keeper(tmp_path, 1, pytest.fail)
    resumed.kept_best = ckpt.read_state(ckpt.steps_on_disk(tmp_path)[-1])["kept_best"]
    assert resumed.save(5, tensor, tensor, {}, 3)
    assert [int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path)] == [2, 5]
    assert resumed.save(6, tensor, tensor, {}, 6)
    assert [int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path)] == [6]


def test_a_save_whose_last_sync_fails_has_happened(tmp_path, monkeypatch):
    def sync(path, real=ckpt.sync):
        if path.name == ckpt.CHECKPOINTS:
            raise OSError(24, "Too many open files")
        real(path)

    monkeypatch.setattr(ckpt, "sync", sync)
    tensor = {"x": torch.zeros(1)}
    assert ckpt.Keeper(tmp_path, 1, pytest.fail).save(1, tensor, tensor, {}, None)


def test_a_state_of_nothing_but_brackets_is_damaged(tmp_path):
    path = ckpt.save(tmp_path, 1, {"x": torch.zeros(1)}, {}, {})
    (path / ckpt.STATE).write_text("[" * 100_000)
    with pytest.raises(ckpt.DamagedCheckpoint, match=r"state\.json is damaged"):
        ckpt.read_state(path)


def test_a_checkpoint_that_cannot_be_deleted_is_only_warned_of(tmp_path, monkeypatch):
    warnings = []
    keeper = ckpt.Keeper(tmp_path, 1, warnings.append)
    tensor = {"x": torch.zeros(1)}
    keeper.save(1, tensor, tensor, {}, None)

    def refuse(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ckpt.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or refuse(path))
    assert keeper.save(2, tensor, tensor, {}, None)
    assert len(warnings) == 1 and "Permission denied" in warnings[0] and "training goes on" in warnings[0]
    assert [p.name for p in ckpt.steps_on_disk(tmp_path)] == ["step-00000002"]
