"""The policy being trained, as one process per device sees it. All ranks make the same calls in the same order."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dapo import device as devices
from dapo.algo.objective import ObjectiveResult, TokenBatch, Totals, merge_sums, policy_objective, reduce_metrics
from dapo.config.run import RunConfig
from dapo.errors import ConfigError
from dapo.model.experts import RouterLoad, router_metrics
from dapo.model.load import load_model
from dapo.model.network import Network
from dapo.model.ulysses import check_heads
from dapo.train import optim, parallel, weights
from dapo.train.collate import Collator, PackTargets, Processor
from dapo.train.persistence import PolicyWriter
from dapo.train.policy import LogProbs, UpdateResult
from dapo.types import PackPlan, TrainBatch

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_ACCELERATOR_RATIO_ERROR = 0.1
"""Of a token's probability ratio where it should be 1. Kernels for CPU compute the same bits with and without gradient;
libraries of accelerators may choose another kernel for each call, which bfloat16 shows. Not measured on a device."""


class FsdpPolicy:
    """One rank's part of the policy: its shards of weights and optimiser state, and its packs of every update.

    Args:
        folder: Hugging Face folder with the weights to start from.
        processor: of the same folder.
        rank, world: of this process; with world > 1 MASTER_ADDR and MASTER_PORT say where rank 0 listens.
        device: where to compute; None: what `config.device` names.
        master_dtype: of weights and optimiser state; float64 only makes sense in tests.

    Raises:
        ConfigError, WeightsError, EnvironmentCheckError: what does not fit, before anything is trained.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        processor: Processor,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        *,
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        kind = devices.resolve(config.device if device is None else device.type)
        self.config, self.folder, self.processor = config, folder, processor
        self.device = devices.torch_device(kind) if device is None else device
        wanted = _DTYPES[config.model.compute_dtype]
        self.compute_dtype = master_dtype if wanted == torch.float32 else wanted
        mixed = self.compute_dtype != master_dtype
        self.ranks = parallel.join(config.model.parallel, kind, self.device, rank, world, mixed)
        host, spread = torch.device("cpu"), config.model.parallel
        self._weights_home = host if spread.offload_parameters else self.device
        self._moments_home = host if spread.offload_optimizer else self._weights_home
        self.network = self._load(folder, master_dtype)
        streamed = spread.offload_optimizer and not spread.offload_parameters
        self.optimizer = optim.make_optimizer(self.network.model, config.model.optimizer, streamed=streamed)
        self.routers = RouterLoad(self.network.model)
        self.updates = 0
        """Optimiser updates made so far in the run."""
        self.collate = Collator(processor, self.network, self.device, master_dtype, self.ranks.sequence)
        self.collate.always_see = self.ranks.mesh is not None
        self.writer = PolicyWriter(
            self.network, self.optimizer, self._moments_home, self.ranks, self.compute_dtype, folder
        )
        self._reference: Network | None = None
        self._plan: PackPlan | None = None
        self._old: dict[tuple[int, int], Tensor] = {}
        self._ref: dict[tuple[int, int], Tensor] = {}

    def _load(self, folder: Path, dtype: torch.dtype, trained: bool = True) -> Network:
        networks: list[Network] = []
        banned = torch.zeros(self.processor.vocab_size, dtype=torch.bool, device=self.device)
        banned[list(self.processor.banned_token_ids)] = True

        def shard(model: PreTrainedModel) -> None:
            check_heads(model.config.get_text_config().num_attention_heads, self.ranks.sequence_parallel)
            replay = trained and self.config.rollout.router_replay
            network = Network(model, self.config.rollout.temperature, banned, router_replay=replay)
            if network.replay is not None and not network.replay.layers:
                raise ConfigError(
                    f"rollout.router_replay=true, but the {model.config.model_type} in {folder} has no experts; set it "
                    "to false"
                )
            model.requires_grad_(trained)
            if self.config.model.freeze_vision and network.visual is not None:
                network.visual.requires_grad_(False)
            text: Any = network.text
            if trained:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                if not self.config.model.gradient_checkpointing:
                    text.gradient_checkpointing_disable()  # the vision tower keeps it: most memory for least computing
            parallel.shard_network(
                network,
                self.ranks,
                self.compute_dtype,
                reshard_after_forward=self.config.model.parallel.reshard_after_forward,
                offload=trained and self.config.model.parallel.offload_parameters,
            )
            networks.append(network)

        home = self._weights_home if trained else self.device
        load_model(folder, device=self.device, home=home, dtype=dtype, shard=shard)
        return networks[0]

    def logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of this rank's packs under the current weights; nothing of a step in progress is touched."""
        return self._logprobs(batch, plan, self.network, {}, self._passes(plan))

    def old_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of this rank's packs, before the first update of the step; kept for `update`.

        Update 0 starts from these very weights: its old log-probabilities are those of its own forward pass. Only one
        pack goes through both passes, so that `update` can compare them; all, if the KL penalty in the reward asks.
        """
        self._plan, self._old, self._ref = plan, {}, {}
        passes = self._passes(plan)
        if not self.config.algorithm.kl.reward_coef:
            packs = plan.updates[0][self.ranks.data_rank]
            witness = min(range(len(packs)), key=lambda i: packs[i].tokens if packs[i].segments else math.inf)
            passes = [(u, i) for u, i in passes if u > 0 or i == witness]
        return self._logprobs(batch, plan, self.network, self._old, passes)

    def _passes(self, plan: PackPlan) -> list[tuple[int, int]]:
        """(update, pack) of all packs of this rank; as many on every rank."""
        return [(u, i) for u, ranks in enumerate(plan.updates) for i in range(len(ranks[self.ranks.data_rank]))]

    def reference_logprobs(self, batch: TrainBatch, plan: PackPlan) -> LogProbs:
        """Of the frozen model the run started from; loaded at the first call."""
        assert self.config.algorithm.kl.needs_reference, "no KL term asks for a reference model"
        if self._reference is None:
            self._reference = self._load(self.folder, self.compute_dtype, trained=False)
        if self.config.model.parallel.offload_reference:
            weights.move(self._reference, self.device)
        result = self._logprobs(batch, plan, self._reference, self._ref, self._passes(plan))
        if self.config.model.parallel.offload_reference:
            weights.move(self._reference, torch.device("cpu"))
            devices.release_cached_memory(self.device)
        return result

    @torch.no_grad()
    def _logprobs(
        self,
        batch: TrainBatch,
        plan: PackPlan,
        network: Network,
        kept: dict[tuple[int, int], Tensor],
        passes: Sequence[tuple[int, int]],
    ) -> LogProbs:
        values: list[list[tuple[float, ...]]] = [[()] * len(g.sequences) for g in batch.groups]
        for u, i in passes:
            inputs, targets = self.collate(batch, plan.updates[u][self.ranks.data_rank][i])
            kept[u, i], _ = network(inputs)
            _spread(kept[u, i], targets, values)
        parallel.reshard(network)
        return LogProbs(tuple(tuple(group) for group in values))

    def update(self, batch: TrainBatch, plan: PackPlan, index: int) -> UpdateResult:
        """Forward, loss and backward over this rank's packs of update `index`, then one AdamW update on all ranks.

        A gradient that is not finite changes nothing: the update is skipped and `skipped` is 1.
        """
        if index > 0:
            assert plan == self._plan, "update > 0 needs old_logprobs of the same plan first"
        packs = plan.updates[index][self.ranks.data_rank]
        totals = _totals(batch, index, self.config.batch.max_response_tokens)
        sums = []
        for i, pack in enumerate(packs):
            parallel.announce_backward(self.network, self.ranks, last=i == len(packs) - 1)
            inputs, targets = self.collate(batch, pack)
            result = self._objective(inputs, targets, totals, (index, i))
            result.loss.backward()
            sums.append(result.sums)
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        metrics, norm = self._over_ranks(merge_sums(sums), optim.gradient_square(parameters, self.ranks))
        if index == 0 and math.isfinite(norm):
            limit = 0.0 if self.device.type == "cpu" else _ACCELERATOR_RATIO_ERROR
            assert metrics["max_ratio_error"] <= limit, (
                f"the first update's probability ratio is off by {metrics['max_ratio_error']}, allowed is {limit}: its "
                "old log-probabilities come from the same packs and weights, so training computes something else than "
                "the log-prob pass"
            )
        return UpdateResult(metrics | self._step(parameters, norm, empty=not metrics["tokens"]))

    def _objective(self, inputs: object, targets: PackTargets, totals: Totals, key: tuple[int, int]) -> ObjectiveResult:
        logprobs, entropy = self.network(inputs)
        tokens = TokenBatch(
            logprobs=logprobs,
            old_logprobs=self._old.get(key, logprobs.detach()),
            rollout_logprobs=targets.rollout_logprobs,
            advantages=targets.advantages,
            sequence_ids=targets.sequence_ids,
            trained=targets.trained,
            ref_logprobs=self._ref.get(key),
            entropy=entropy if self.config.algorithm.entropy_coef else entropy.detach(),
        )
        return policy_objective(tokens, self.config.algorithm, totals)

    def _over_ranks(self, sums: dict[str, Tensor], square: Tensor) -> tuple[dict[str, float], float]:
        """Metrics and the gradient's norm over all ranks, in one exchange."""
        routed = self.routers.take()
        parts = {**sums, "square": square} | ({} if routed is None else {"routed": routed})
        own = torch.cat([part.detach().flatten().cpu().double() for part in parts.values()])
        columns = self.ranks.gather(own).split([part.numel() for part in parts.values()], dim=1)
        ranks = dict(zip(parts, columns, strict=True))
        norm = float((ranks["square"].sum() / self.ranks.shard_copies).sqrt())
        merged = {}
        for name, value in sums.items():
            # Ranks that share their packs computed the same sums.
            rows = ranks[name][:: self.ranks.sequence_parallel]
            merged[name] = (rows.amax(0) if name.startswith("max_") else rows.sum(0)).view_as(value)
        metrics = reduce_metrics(merged)
        return metrics if routed is None else metrics | router_metrics(ranks["routed"].sum(0).view_as(routed)), norm

    def _step(self, parameters: list[nn.Parameter], norm: float, *, empty: bool) -> dict[str, float]:
        config = self.config.model.optimizer
        finite = norm < float("inf")
        rate = optim.learning_rate(config, self.updates + 1)
        # Without a token there is nothing to learn: weight decay and old momentum alone would move the weights.
        if finite and not empty:
            optim.clip_gradients(parameters, norm, config.max_grad_norm)
            optim.step(self.optimizer, rate, self._moments_home, self._weights_home)
            self.updates += 1
        else:
            log.error("update skipped: %s", "it has no token to train on" if finite else f"the gradient norm is {norm}")
        self.optimizer.zero_grad()
        return {"grad_norm": norm, "lr": rate, "skipped": float(empty or not finite)}

    @property
    def model(self) -> nn.Module:
        """The transformers model inside; its parameters may be DTensors."""
        return self.network.model

    def named_weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors in the compute dtype, in transformers' names and layout, tied weights once; collective.

        Args:
            names: only these; the same on all ranks.
        """
        return weights.whole_tensors(self.network.model, self.compute_dtype, names)

    def fingerprint(self) -> dict[str, float]:
        """Float64 sum of absolute values of each of `named_weights`; collective."""
        return weights.fingerprint(self.network.model, self.compute_dtype, self.ranks)

    def save(self, folder: Path) -> None:
        self.writer.save(folder, self.updates)

    def export(self, folder: Path) -> None:
        self.writer.export(folder)

    def written(self, *, wait: bool) -> bool:
        return self.writer.written(wait=wait)

    def load(self, folder: Path) -> None:
        self.updates = self.writer.load(folder)
        self._plan, self._old, self._ref = None, {}, {}

    def close(self) -> None:
        """Finish what is being written and leave the process group."""
        try:
            self.writer.written(wait=True)
        finally:
            parallel.leave()


def _spread(logprobs: Tensor, targets: PackTargets, values: list[list[tuple[float, ...]]]) -> None:
    if not targets.sequences:
        return
    parts = logprobs.cpu().split(list(targets.lengths))
    for (group, sequence), part in zip(targets.sequences, parts, strict=True):
        values[group][sequence] = tuple(part.tolist())


def _totals(batch: TrainBatch, index: int, max_response_tokens: int) -> Totals:
    sequences = [s for g in batch.updates[index] for s in batch.groups[g].sequences]
    return Totals.of((len(s.response_ids) for s in sequences), (s.trained for s in sequences), max_response_tokens)
