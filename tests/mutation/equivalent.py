"""The mutants that cannot be noticed, and why: the site is switched off or altered, the kernel as right as before.

A key is the one that a failing test prints: the alteration, if there is one; file, function and code of the call, then
those of the calls through which it was inlined. A line that holds no site because the barrier of its helper was
compiled away is listed by its own key. What is listed and is noticed all the same, or is not there any more, fails a
test.
"""

from __future__ import annotations

_TAKE = "csrc/attention/tiles_sm90.cuh, take: barrier_sync(kFirstBarrier + member, 2 * kWarpgroup);"
_TAKEN_TO_ATTEND = "csrc/attention/forward_sm90.cu, consume: turns.take(tile); (2)"
_TAKEN_TO_PASS = "csrc/attention/forward_sm90.cu, consume: turns.take(tile);"
_CONSUME = (
    "csrc/attention/forward_sm90.cu, attention_forward_sm90_kernel: "
    "consume<Tile>(shared, p, powers, maps, TileOfQueries<Tile>(p.plan, maps.heads_together, place), q, at);"
)

EQUIVALENT: dict[tuple[str, ...], str] = {
    (
        "csrc/rotary/rotary.cu, of: return {first, first + kSize, false, in_bounds(first + kSize, int(plan.width))};",
        "csrc/rotary/rotary.cu, rotary_norm_backward_kernel: "
        "const Places at = Places::of<kSize>(plan, slots, slots.first());",
    ): "the sum of a vector that is not there goes to a place in shared memory that nobody reads",
    (
        "csrc/embedding/embedding.cu, add_places: if (in_bounds(lane, count)) place_of_lane = p.order[first + lane];",
        "csrc/embedding/embedding.cu, embedding_runs_kernel: add_places<T>(p, begin, end, column, sums);",
    ): "a run has as many places as lanes, twice; the helper has other callers",
    **{
        ("csrc/device/reduce.cuh, sum_over: __syncthreads();", f"csrc/grad_norm/grad_norm.cu, {caller}"): (
            "a block adds up once; the barrier is before the sums of a call that follows another"
        )
        for caller in (
            "grad_norm_partials_kernel: sum_over<kThreads>(sums);",
            "grad_norm_kernel: sum_over<kFinalThreads>(sums);",
        )
    },
    (
        "csrc/attention/backward_sm80.cu, attention_backward_sm80_kernel: "
        "const bool exists = in_bounds(tile * Tile::kQueries + row, plan.queries);",
        "csrc/attention/backward_sm80.cu, attention_backward_sm80_kernel: "
        "for (int gap = cleared; gap < first_tile; ++gap) clear_queries(gap);",
    ): "queries that see something follow on those of a gap, so all of these exist; the helper has other callers",
    (
        "csrc/attention/forward_sm90.cu, attention_forward_sm90_kernel: for_each_tile(maps.tiles, [&](int place) {",
    ): "what it is given is not inlined into it, and has sites of its own",
    (
        "another barrier",
        "csrc/attention/backward_sm90.cu, consume: barrier_sync(kDsBarrier, Tile::kConsumers * kWarpgroup);",
        "csrc/attention/backward_sm90.cu, attention_backward_sm90_kernel: "
        "consume<Tile>(shared, p, powers, maps, block);",
    ): "of a tile that nobody sees: all who wait for each other come to this line, and the other barrier is free",
    (
        "waits for reading alone",
        "csrc/attention/backward_sm90.cu, consume: if (first) bulk_wait<0>();",
    ): "hundreds of operations come between two additions to a row, and the emulator tells 64 apart",
    **{
        ("arrives and does not wait", _TAKE, *chain): (
            "turns are there for speed: no result depends on them, and the ring of stages lets a warpgroup that takes "
            "no heed of them run so little ahead that its counts still come out"
        )
        for chain in (
            (_TAKEN_TO_ATTEND, "csrc/attention/forward_sm90.cu, consume: attend(No(), Yes(), Few());", _CONSUME),
            (_TAKEN_TO_PASS,),
        )
    },
}

# Kinds of sites that order nothing in the emulator by themselves (docs/emulator.md, "What it cannot show").
WITHOUT_EFFECT: dict[str, str] = dict.fromkeys(
    ("__threadfence", "__threadfence_block", "__threadfence_system"),
    "the barrier or the launch that follows a fence is what orders memory here",
)


def reason(kind: str, key: tuple[str, ...]) -> str | None:
    """Why a mutant cannot be noticed; None: it can."""
    return EQUIVALENT.get(key) or WITHOUT_EFFECT.get(kind)
