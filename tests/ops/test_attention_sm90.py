"""attention's forward on Hopper: by the rule and to the bit, on the emulator; and what it costs."""

from __future__ import annotations

import math
import mmap
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import native
from fastgpt.native import toolchain
from fastgpt.ops import attention, document_bounds
from tests.native_cases import built
from tests.ops import kernels
from tests.ops.test_attention import (
    check_that_only_who_sees_it_knows_of_what_is_not_finite,
    inputs,
    naive,
    naive_apart,
    naive_with_lse,
)
from tests.rule import as_tuple, assert_within_rule, in_layout

BF16, F16 = torch.bfloat16, torch.float16
SERVED = ("sm90", "16 bits, by TMA and wgmma")


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with kernels.at(kernels.EMULATED, chip="sm_90a"), torch.no_grad():
        yield


def by_rule(arguments: list[Tensor], torchs: Callable[..., Any] | None = None, **options: Any) -> None:
    """What `attention` gives, on this path, against `torchs` or the equations."""
    found = as_tuple(attention(*arguments, **options))
    assert kernels.last_path() == SERVED
    torchs = torchs or (lambda *t: naive(*t, **options))
    same, exact = as_tuple(torchs(*arguments)), as_tuple(torchs(*(t.double() for t in arguments)))
    what = f"{[tuple(t.shape) for t in arguments[:2]]} {arguments[0].dtype} {options}"
    for a, b, c in zip(found, same, exact, strict=True):
        assert_within_rule(a, b, c, what)


# ---- lengths, masks, widths, heads -----------------------------------------------------------------------

MASKS = (dict(), dict(causal=False), dict(window=0), dict(window=70), dict(causal=False, window=3), dict(window=9999))
LENGTHS = [(9, 1), (9, 12), (63, 65), (64, 64), (65, 63), (127, 129), (128, 128), (129, 127)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_edge_lengths_and_masks(lengths: tuple[int, int]) -> None:
    """One off a tile either way (of 64 and 128), and both ways unequal. Fewer than nine queries are decoding's."""
    for i, masks in enumerate(MASKS):
        by_rule(inputs(1, *lengths, 2, 1, 16, (BF16, F16)[(sum(lengths) + i) % 2]), **masks)


@pytest.mark.parametrize(
    ("lengths", "dtype", "masks"),
    [
        ((239, 1), BF16, dict(causal=False)),
        ((799, 9), F16, dict()),
        ((9, 799), F16, dict()),
        ((9, 799), BF16, dict(window=100)),
        ((113, 203), BF16, dict()),
        ((113, 203), F16, dict(causal=False, window=30)),
        ((108, 256), F16, dict(causal=False)),
        ((200, 520), BF16, dict(window=300)),  # tiles with masks, then whole ones, then masks again
        ((1023, 1024), BF16, dict(window=80)),
        ((1024, 1023), F16, dict()),
    ],
    ids=str,
)
def test_long_lengths(lengths: tuple[int, int], dtype: torch.dtype, masks: dict[str, Any]) -> None:
    by_rule(inputs(1, *lengths, 1, 1, 64, dtype), **masks)


@pytest.mark.parametrize("D", [8, 40, 64, 72, 96, 104, 120, 128])
def test_widths(D: int) -> None:
    """Each tile, full and with columns that are zeros."""
    by_rule(inputs(1, 140, 270, 1, 1, D, (BF16, F16)[D // 8 % 2]), causal=D % 16 == 0)


@pytest.mark.parametrize("heads", [(3, 1), (6, 3)], ids=str)
def test_heads_come_in_sections(heads: tuple[int, int]) -> None:
    """The emulated cache has room for the keys and values of two heads of 150: blocks are not in the order of heads."""
    by_rule(inputs(3, 150, 150, *heads, 64, BF16))


@pytest.mark.parametrize(
    "options", [dict(softcap=2.0), dict(scale=0.3), dict(scale=0.5, softcap=5.0, window=4)], ids=str
)
def test_scale_and_softcap(options: dict[str, Any]) -> None:
    by_rule(inputs(1, 140, 140, 2, 1, 80, F16 if "softcap" in options else BF16), **options)


def test_nothing_to_do() -> None:
    for sizes in (dict(B=0), dict(Tq=0), dict(Tk=0), dict(H=0)):
        arguments = inputs(**{**dict(B=1, Tq=70, Tk=70, H=1, KV=1, D=8, dtype=BF16), **sizes})
        o, lse = attention(*arguments, return_lse=True)
        assert (o == 0).all() and (lse == -math.inf).all() and o.shape == arguments[0].shape


def test_lse_by_the_rule() -> None:
    by_rule(inputs(1, 177, 177, 2, 1, 16, BF16), naive_with_lse, return_lse=True)


def test_of_what_is_not_finite_only_those_who_see_it_know() -> None:
    check_that_only_who_sees_it_knows_of_what_is_not_finite()


# ---- documents -------------------------------------------------------------------------------------------


def packed() -> tuple[Tensor, Tensor]:
    """Bounds of documents that begin and end inside and at the bounds of tiles, some of them empty."""
    return document_bounds(torch.tensor([0, 5, 5, 60, 64, 128, 203, 203, 330]), 1, 330)


@pytest.mark.parametrize("masks", [dict(), dict(window=7), dict(causal=False)], ids=str)
def test_documents_by_the_rule(masks: dict[str, Any]) -> None:
    start, end = packed()

    apart = naive_apart((start, end), **masks)
    by_rule(inputs(1, 330, 330, 2, 1, 16, BF16), apart, doc_start=start, doc_end=end, **masks)


@pytest.mark.parametrize("first_tokens", [(0, 64, 500), (0, 100, 320, 700), (0, 192, 700)], ids=str)
def test_one_warpgroup_is_done_long_before_the_other(first_tokens: tuple[int, ...]) -> None:
    """After half a tile, two, or one and a half: the other one goes on, round the ring."""
    start, end = document_bounds(torch.tensor(first_tokens), 1, first_tokens[-1])

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = [[t[:, i:j] for t in (q, k, v)] for i, j in pairwise(first_tokens)]
        return torch.cat([naive(*document, causal=False) for document in documents], 1)

    T = first_tokens[-1]
    by_rule(inputs(1, T, T, 1, 1, 8, BF16), apart, doc_start=start, doc_end=end, causal=False)


def test_both_warpgroups_pass_a_tile() -> None:
    """Bounds need not be documents': these leave tiles between what the one sees and what the other one sees."""
    T = 700
    start, end = torch.zeros(1, T, dtype=torch.int32), torch.full((1, T), 100, dtype=torch.int32)
    start[:, 64:], end[:, 64:] = 600, T

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = ((slice(0, 64), slice(0, 100)), (slice(64, T), slice(600, T)))
        return torch.cat([naive(q[:, of], k[:, seen], v[:, seen], causal=False) for of, seen in parts], 1)

    by_rule(inputs(1, T, T, 1, 1, 8, BF16), apart, doc_start=start, doc_end=end, causal=False)


@pytest.mark.parametrize("T", [1, 2, 330])
def test_few_queries_come_here_with_documents(T: int) -> None:
    start, end = torch.zeros(2, T, dtype=torch.int32), torch.full((2, T), T, dtype=torch.int32)
    by_rule(inputs(2, T, T, 2, 1, 16, F16), naive, doc_start=start, doc_end=end)


def test_other_documents_do_not_matter_to_the_bit() -> None:
    start, end = packed()
    clean = inputs(1, 330, 330, 1, 1, 8, BF16)
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[0, 64:128] = 3 * t[0, 64:128] + 1
    a, b = (attention(*given, doc_start=start, doc_end=end) for given in (clean, dirty))
    assert not torch.equal(a[0, 64:128], b[0, 64:128])
    for untouched in (slice(0, 64), slice(128, 330)):
        assert torch.equal(a[0, untouched], b[0, untouched])


# ---- which path ------------------------------------------------------------------------------------------


def far_apart() -> Tensor:
    """(2, 9, 1, 16) whose sequences are 2^40 bytes apart; nothing between is touched, so it takes no memory."""
    reserve_nothing = 0x4000  # Linux's MAP_NORESERVE, which Python has no name for
    room = mmap.mmap(-1, 2**40 + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return torch.frombuffer(room, dtype=BF16).as_strided((2, 9, 1, 16), (2**39, 16, 16, 1))


REFUSED = {
    "no keys": lambda: (inputs(1, 9, 0, D=16, dtype=BF16), {}),
    "lengths of keys": lambda: (inputs(1, 9, 9, D=16, dtype=BF16), dict(kv_lengths=torch.tensor([5]))),
    "rows of a tensor overlap": lambda: (
        [inputs(2, 9, 9, D=16, dtype=BF16)[0], *(t[:1].expand(t.shape) for t in inputs(2, 9, 9, D=16, dtype=BF16)[1:])],
        {},
    ),
    "rows are too far apart for TMA": lambda: ([far_apart(), *inputs(2, 9, 9, 1, 1, 16, BF16)[1:]], {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_tma_does_not_serve_goes_to_the_sm80_path(reason: str) -> None:
    arguments, options = REFUSED[reason]()
    with native.emulated(checked="far" not in reason):  # the checks keep a byte for each element between
        found = attention(*arguments, **options)
    assert kernels.last_path() == ("sm80", reason)
    with native.emulated(chip="sm_80"):
        assert torch.equal(found, attention(*(t.clone() for t in arguments), **options))


def test_what_tensor_cores_do_not_serve_goes_to_the_generic_path() -> None:
    q, k, v = inputs(1, 9, 9, D=16, dtype=BF16)
    attention(in_layout(q, "offset"), k, v)
    assert kernels.last_path() == ("generic", "a tensor does not begin at a multiple of 16 bytes")


def test_which_chips_it_serves() -> None:
    """Newer ones have no wgmma."""
    arguments = inputs(1, 9, 9, D=16, dtype=BF16)
    for chip, path in (("sm_80", "sm80"), ("sm_90a", "sm90"), ("sm_100", "sm80")):
        with native.emulated(chip=chip):
            attention(*arguments)
            assert kernels.last_path()[0] == path


def test_strides_are_taken_as_they_are() -> None:
    """Views of one projection, tokens and heads in another order, rows with gaps."""
    q, k, v = inputs(2, 133, 133, 4, 2, 16, BF16)
    expected = attention(q, k, v)
    packed = torch.cat([q, k, v], 2)
    views = [
        list(packed.split([4, 2, 2], 2)),
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for t in (q, k, v)],
        [torch.cat([t, t], -1)[..., :16] for t in (q, k, v)],
    ]
    assert views[0][1].data_ptr() == packed.data_ptr() + 4 * 16 * 2
    for arguments in views:
        assert torch.equal(attention(*arguments), expected)
        assert kernels.last_path() == SERVED


def test_a_head_may_lie_beyond_two_billion_elements() -> None:
    arguments = inputs(1, 9, 9, 1, 1, 8, BF16)
    far = [torch.empty(9 * 2**30 + 64, dtype=BF16).as_strided(t.shape, (8, 2**30, 8, 1)).copy_(t) for t in arguments]
    with native.emulated(checked=False):
        assert torch.equal(attention(*far), attention(*arguments))
        assert kernels.last_path() == SERVED


# ---- the same every time ---------------------------------------------------------------------------------


def test_bitwise_the_same_over_schedules() -> None:
    arguments = inputs(2, 300, 300, 4, 2, 72, BF16)
    runs = []
    for seed in (1, 2, 3):
        with native.emulated(seed=seed):
            runs.append(list(attention(*arguments, return_lse=True)))
    assert kernels.same(runs[0], runs[1]) and kernels.same(runs[1], runs[2])
    assert not native.findings()


# ---- what it costs ---------------------------------------------------------------------------------------


def counted(arguments: list[Tensor], **options: Any) -> list[dict[str, Any]]:
    with native.emulated(profile=True, checked=False):
        native.counters()
        attention(*arguments, **options)
        return native.counters()


def test_flops_executed_over_those_that_a_causal_mask_leaves() -> None:
    """At T = 1024, D = 64: a warpgroup goes no further than its own queries see, by halves of tiles."""
    T, D = 1024, 64
    lines = counted(inputs(1, T, T, 1, 1, D, BF16))
    assert 1 <= sum(line.get("flops", 0) for line in lines) / (2 * D * T * (T + 1)) <= 1.07
    assert not any(line.get("bank_conflicts") for line in lines)


@pytest.mark.parametrize("D", [40, 96, 128])
def test_no_bank_conflicts_and_each_byte_once(D: int) -> None:
    """One tile of queries: Q, K and V come once, and O goes once."""
    lines = counted(inputs(1, 128, 300, 2, 2, D, F16), causal=False)
    assert not any(line.get("bank_conflicts") for line in lines)
    moved = {"load": 0, "store": 0}
    for line in lines:
        if line.get("space") == "global":
            moved[line["access"]] += line["bytes"]
    assert moved == {"load": 2 * 2 * D * (128 + 2 * 300), "store": 2 * 128 * (2 * D + 4)}


def share_of_flops(counted: Callable[..., list[dict[str, Any]]]) -> list[float]:
    """Of 1024 keys under a causal mask alone: those under a window of 9, and in documents of 10."""
    arguments = inputs(1, 1024, 1024, 1, 1, 8, BF16)
    start, end = document_bounds(torch.arange(0, 1024, 10), 1, 1024)
    causal, *few = (
        sum(line.get("flops", 0) for line in counted(arguments, **masks))
        for masks in (dict(), dict(window=9), dict(doc_start=start, doc_end=end))
    )
    return [flops / causal for flops in few]


def test_what_the_masks_hide_is_not_computed() -> None:
    """Of 1024 keys a window of 9 leaves a tile or two for each tile of queries, and a document as much."""
    assert max(share_of_flops(counted)) < 0.35


# ---- what the compiler made of it ------------------------------------------------------------------------


def test_instantiations_are_few() -> None:
    """Each one costs everybody's build time, for every architecture."""
    found = kernels.instantiations(r"attention_forward_sm90_kernel")
    assert len(found) == 6, sorted(found)


def code_of_kernels(file: str, folder: Path) -> list[str]:
    """The machine code of each kernel of csrc/attention/`file`.cu for sm_90a; `folder` is an empty one."""
    library = built("cuda")
    try:
        cuobjdump = toolchain.find_cuobjdump()
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*arguments: str) -> str:
        command = [cuobjdump, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout

    run("-xelf", f"{file}.sm_90a", library)
    if not (files := list(folder.iterdir())):
        pytest.skip("the library has no code for sm_90a")
    return run("-sass", files[0].name).split("Function : ")[1:]


def test_exponentials_are_in_front_of_the_wait_that_they_overlap_with(tmp_path: Path) -> None:
    """In the machine code: the wait for Q K^T, exponentials (as many again for a softcap), the wait for P V. Of a tile
    with masks, of one without and of half a tile; two more exponentials are those of the sums so far."""
    codes = code_of_kernels("forward_sm90", tmp_path)
    assert len(codes) == 6
    for code in codes:
        assert code.count("USETMAXREG") == 2 and "UTMALDG" in code and "UTMASTG" in code
        between = re.findall(r"DEPBAR\.LE gsb0, 0x1 (.*?)DEPBAR\.LE gsb0, 0x0 ", code, re.S)
        assert sorted(part.count("MUFU.EX2") for part in between) == [66, 130, 130]
