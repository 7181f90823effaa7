"""AdamW, and Muon for hidden matrices, as ordinary torch optimizers over `fastgpt.ops.adamw_`.

Parameters below fp32 are updated through an fp32 master copy in the optimizer's state, which is the
canonical value: after every step the parameter is the master, rounded. With `stochastic_rounding` there is
no master; the rounding is random but a pure function of (seed, step, parameter, element).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import ops
from .config import OptimConfig

LOW_PRECISION = (torch.bfloat16, torch.float16)

# Newton-Schulz iteration of Muon: a quintic whose coefficients maximise the slope at zero
# (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101).

    A drop-in for `torch.optim.AdamW`: parameter groups, `state_dict`, schedulers. State per parameter: `step`
    (0-dim fp32, shared by the parameters that began together), `exp_avg`, `exp_avg_sq` (fp32, or fp64 for fp64
    parameters), and `master` (fp32) for a bf16 or fp16 parameter without `stochastic_rounding`.

    Raises ValueError for a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        **defaults,
    ):
        if not isinstance(lr, Tensor) and not lr >= 0.0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        if not eps > 0.0:
            raise ValueError(f"eps must be more than 0, got {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **defaults))

    @torch.no_grad()
    def step(self, closure=None, *, clip: Tensor | None = None, skip: Tensor | None = None):
        """One update. `clip` (0-dim) multiplies every gradient; `skip` (0-dim), where not zero, leaves everything
        as it was. Neither is read by the host."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._initialise(params, group)
            self._update(group, params, clip, skip)
        return loss

    def uses_master(self, p: Tensor, group: dict) -> bool:
        """Whether the canonical value of a parameter is an fp32 copy in the state."""
        return p.dtype in LOW_PRECISION and not self.stochastic_rounding

    def moments(self, group: dict) -> tuple[str, ...]:
        """Names of the tensors that the state holds for each parameter of a group, beside `step` and `master`."""
        return ("exp_avg", "exp_avg_sq")

    def _initialise(self, params: list[Tensor], group: dict) -> None:
        fresh = [p for p in params if not self.state.get(p)]
        if not fresh:
            return
        count = torch.zeros((), dtype=torch.float32, device=fresh[0].device)
        for p in fresh:
            exact = torch.float64 if p.dtype == torch.float64 else torch.float32
            state = self.state[p]
            state["step"] = count
            for name in self.moments(group):
                state[name] = torch.zeros_like(p, dtype=exact)
            if self.uses_master(p, group):
                state["master"] = p.detach().to(torch.float32)

    def _update(self, group: dict, params: list[Tensor], clip: Tensor | None, skip: Tensor | None) -> None:
        # random bits differ by parameter, whichever groups they are in
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for count, members in self._by_step(group, params):
            states = [self.state[p] for p in members]
            count += 1.0 if skip is None else (skip == 0).to(count.dtype)
            ops.adamw_(
                members,
                [p.grad for p in members],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                masters=[s["master"] for s in states] if "master" in states[0] else None,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=count,
                clip=clip,
                skip=skip,
                seed=self.seed if self.stochastic_rounding else None,
                tensor_ids=[number[p] for p in members] if self.stochastic_rounding else None,
            )

    def _by_step(self, group: dict, params: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """Parameters that share a step count and a dtype: one call of the op each."""
        standing = {id(self.state[p]["step"]) for p in group["params"] if p.grad is None and self.state.get(p)}
        moving: dict[int, Tensor] = {}
        buckets: dict[tuple, tuple[Tensor, list[Tensor]]] = {}
        for p in params:
            count = self.state[p]["step"]
            if id(count) in standing:  # shared with a parameter that has no gradient this time: parted from it
                count = self.state[p]["step"] = moving.setdefault(id(count), count.clone())
            buckets.setdefault((id(count), p.dtype), (count, []))[1].append(p)
        return list(buckets.values())

    def state_dict(self) -> dict:
        """As torch's: numbers are numbers, and nothing is shared between parameters, so that any AdamW can load it."""
        saved = super().state_dict()
        groups = [{**group, "lr": float(group["lr"])} for group in saved["param_groups"]]
        state = {n: {**s, "step": s["step"].clone()} if "step" in s else s for n, s in saved["state"].items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, from this class or from `torch.optim.AdamW`; moments are kept in fp32 where they are here, equal
        step counts are shared, and a master that is missing begins as its parameter.

        Raises ValueError for state of a variant that this class is not (amsgrad, maximize)."""
        for group in state_dict["param_groups"]:
            variants = [name for name in ("amsgrad", "maximize") if group.get(name)]
            if group.get("decoupled_weight_decay") is False:
                variants.append("weight decay in the gradient (torch.optim.Adam's)")
            if variants:
                raise ValueError(
                    f"the state is of an optimizer with {' and '.join(variants)}, which {type(self).__name__} does not "
                    "do; load it into the class that it came from"
                )
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for saved_group, group, before in zip(state_dict["param_groups"], self.param_groups, own, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)  # what the other class does not have
            counts: dict[float, Tensor] = {}
            for number, p in zip(saved_group["params"], group["params"], strict=True):
                saved = state_dict["state"].get(number)
                if not saved:
                    continue
                exact = torch.float64 if p.dtype == torch.float64 else torch.float32
                state = self.state[p]
                for name, value in saved.items():
                    if name == "step":
                        count = torch.as_tensor(value, dtype=torch.float32, device=p.device).clone()
                        state["step"] = counts.setdefault(float(count), count)
                    elif isinstance(value, Tensor):
                        state[name] = value.to(device=p.device, dtype=exact, copy=True)
                if self.uses_master(p, group) and "master" not in state:
                    state["master"] = p.detach().to(torch.float32)


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, rows, columns) -> the nearest semi-orthogonal matrices, roughly: U S' V^T with singular values S' near 1.

    Newton-Schulz iteration in `dtype` (see NEWTON_SCHULZ_COEFFICIENTS), on the smaller side.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(AdamW):
    """Momentum, orthogonalised, for the groups marked `muon=True`; AdamW for the others.

    For hidden matrices only (Jordan et al., 2024): embeddings, the head, norms and biases belong to AdamW. A muon
    group has `lr`, `weight_decay`, `momentum`, and may have `splits`, a tuple of row counts: the parameter is then
    several matrices stacked (the packed QKV projection), each orthogonalised by itself. Matrices of one shape are
    orthogonalised as one batch. State: `momentum_buffer` (fp32), and `master` as in AdamW.
    """

    working_dtype: torch.dtype | None = None
    """Of the orthogonalisation. None: bfloat16, but float32 for the wider parameters of a run on a CPU, which may well
    have no instructions for bfloat16 (then it took 30 times as long)."""

    def __init__(self, params: Iterable, lr: float | Tensor = 1e-3, momentum: float = 0.95, **options):
        super().__init__(params, lr, momentum=momentum, muon=False, splits=None, **options)
        for group in self.param_groups:
            if group["muon"] and any(p.dim() != 2 for p in group["params"]):
                shapes = [tuple(p.shape) for p in group["params"] if p.dim() != 2]
                raise ValueError(f"Muon takes matrices only, got shapes {shapes}: give these to a group without muon")

    def moments(self, group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["muon"] else super().moments(group)

    def uses_master(self, p: Tensor, group: dict) -> bool:
        return p.dtype in LOW_PRECISION and (group["muon"] or not self.stochastic_rounding)

    def _update(self, group: dict, params: list[Tensor], clip: Tensor | None, skip: Tensor | None) -> None:
        if not group["muon"]:
            super()._update(group, params, clip, skip)
            return
        keep = None if skip is None else skip != 0
        pieces: dict[
            tuple[int, int], list[tuple[Tensor, Tensor]]
        ] = {}  # by shape: where to apply, what to orthogonalise
        for p in params:
            state = self.state[p]
            grad = p.grad.to(state["momentum_buffer"].dtype)
            if clip is not None:
                grad = grad * clip
            momentum = state["momentum_buffer"].lerp(grad, 1 - group["momentum"])
            if keep is not None:
                momentum = torch.where(keep, state["momentum_buffer"], momentum)
            state["momentum_buffer"].copy_(momentum)
            update = grad.lerp(momentum, group["momentum"])  # Nesterov
            target = state.get("master", p)
            rows = group["splits"] or (p.shape[0],)
            for where, what in zip(target.split(rows), update.split(rows), strict=True):
                pieces.setdefault(tuple(what.shape), []).append((where, what))
        wide_on_cpu = params[0].device.type == "cpu" and params[0].dtype not in LOW_PRECISION
        dtype = self.working_dtype or (torch.float32 if wide_on_cpu else torch.bfloat16)
        for shape, members in pieces.items():
            updates = orthogonalise(torch.stack([what for _, what in members]), dtype)
            rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
            for (where, _), update in zip(members, updates, strict=True):
                new = where * (1 - group["lr"] * group["weight_decay"]) - rate * update.to(where.dtype)
                where.copy_(new if keep is None else torch.where(keep, where, new))
        for p in params:
            if "master" in self.state[p]:
                p.copy_(self.state[p]["master"])
        for count, _ in self._by_step(group, params):
            count += 1.0 if skip is None else (skip == 0).to(count.dtype)


def build_optimizer(model: torch.nn.Module, config: OptimConfig, *, stochastic_rounding: bool = False, seed: int = 0):
    """The optimizer of a GPT: decay on matrices only; with `muon`, the blocks' matrices go to Muon.

    Every group carries `initial_lr`, which the schedule scales. Returns AdamW or Muon.
    """
    matrices, vectors, hidden = [], [], {}
    heads = model.config
    for name, p in model.named_parameters():
        if config.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks."):
            splits = None
            if name.endswith("attention.qkv.weight"):
                splits = tuple(n * heads.head_dim for n in (heads.n_head, heads.n_kv_head, heads.n_kv_head))
            elif name.endswith("ffn.up.weight") and heads.activation == "swiglu":
                splits = (heads.ffn_width, heads.ffn_width)
            hidden.setdefault(splits, []).append(p)
        else:
            (matrices if p.dim() >= 2 else vectors).append(p)
    groups = [
        dict(params=matrices, weight_decay=config.weight_decay, lr=config.lr),
        dict(params=vectors, weight_decay=0.0, lr=config.lr),
    ]
    groups += [
        dict(params=params, muon=True, splits=splits, lr=config.muon_lr, weight_decay=config.weight_decay)
        for splits, params in hidden.items()
    ]
    options = dict(
        betas=(config.beta1, config.beta2), eps=config.eps, stochastic_rounding=stochastic_rounding, seed=seed
    )
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "muon":
        optimizer = Muon(groups, momentum=config.muon_momentum, **options)
    else:
        optimizer = AdamW(groups, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
