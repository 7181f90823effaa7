"""Checkpoints on disk: exact round trips, damage found, strangers refused. Kills and full disks: test_chaos.py."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from fastgpt import checkpoint as ckpt
from fastgpt.config import OptimConfig
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.optim import build_optimizer
from fastgpt.precision import apply_precision
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

    with pytest.raises(UserError, match=file if file != ckpt.STATE or damage != "missing" else "not a checkpoint"):
        ckpt.load(newest)  # named by the user: no fallback
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


def test_a_pickle_is_refused_and_never_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = write(tmp_path)
    for file in (ckpt.MODEL, ckpt.OPTIMIZER, ckpt.STATE):
        copy = tmp_path / "copy" / "checkpoints" / "step-00000001"
        shutil.copytree(path, copy)
        (copy / file).write_bytes(pickle.dumps(Bomb()))
        if file != ckpt.STATE:  # with a matching checksum, too
            state = json.loads((copy / ckpt.STATE).read_text())
            state.pop("state_sha256")
            state["sha256"][file] = ckpt._sha256(copy / file)
            (copy / ckpt.STATE).write_text(json.dumps({**state, "state_sha256": ckpt._digest(state)}))
        with pytest.raises(UserError):
            ckpt.load(copy)
        shutil.rmtree(tmp_path / "copy")
    assert not (tmp_path / "exploded").exists()


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


def test_the_newest_and_the_best_are_kept(tmp_path):
    keeper = ckpt.Keeper(tmp_path, 2, pytest.fail)
    tensor = {"x": torch.zeros(1)}
    for step in range(1, 7):
        assert keeper.save(step, tensor, tensor, {}, best_step=min(step, 2))
    assert [int(p.name[5:]) for p in ckpt.steps_on_disk(tmp_path)] == [2, 5, 6]


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
