"""The algorithm's settings. Defaults are the recipe's: DAPO as run on Geometry3K."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dapo.config.base import Frozen

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class ClipConfig(Frozen):
    """Clip-Higher (DAPO section 3.1) and dual clip (arXiv 1912.09729)."""

    low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped from below at 1 - low."""
    high: NonNegative = 0.28
    """The ratio is clipped from above at 1 + high; above `low` it leaves room for unlikely tokens to grow."""
    dual: Annotated[float, Field(gt=1)] | None = 10.0
    """Where the advantage is negative the loss is capped at dual * |advantage|; null turns it off."""


class DapoLossConfig(Frozen):
    """The clipped surrogate with separate bounds."""

    kind: Literal["dapo"] = "dapo"
    clip: ClipConfig = ClipConfig()


class GspoLossConfig(Frozen):
    """GSPO (arXiv 2507.18071): one length-normalised ratio per sequence."""

    kind: Literal["gspo"] = "gspo"
    clip: ClipConfig = ClipConfig(low=3e-4, high=4e-4, dual=None)


class CispoLossConfig(Frozen):
    """CISPO (arXiv 2506.13585): the clipped ratio weighs the log-probability and carries no gradient."""

    kind: Literal["cispo"] = "cispo"
    low: NonNegative | None = None
    """Lower bound is 1 - low; null: no lower bound, as in the paper."""
    high: Positive = 5.0
    """Upper bound is 1 + high."""


class ClipCovLossConfig(Frozen):
    """Clip-Cov (arXiv 2505.22617): tokens of high covariance lose their gradient."""

    kind: Literal["clip_cov"] = "clip_cov"
    clip: ClipConfig = ClipConfig(low=1.0 - 1e-9, high=1.0, dual=None)
    share: Fraction = 2e-4
    """Share of valid tokens detached."""
    cov_low: float = 1.0
    cov_high: float = 5.0
    """Only tokens whose covariance lies between the bounds are candidates."""


class KlCovLossConfig(Frozen):
    """KL-Cov (arXiv 2505.22617): tokens of the highest covariance pay a KL penalty."""

    kind: Literal["kl_cov"] = "kl_cov"
    share: Fraction = 2e-3
    coef: NonNegative = 1.0


LossConfig = Annotated[
    DapoLossConfig | GspoLossConfig | CispoLossConfig | ClipCovLossConfig | KlCovLossConfig,
    Field(discriminator="kind"),
]

AggregationName = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"
]
KlKind = Literal["k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"]


class KlConfig(Frozen):
    """KL to the reference policy. The reference model is loaded only where a coefficient is above zero."""

    loss_coef: NonNegative = 0.0
    """Weight of the KL term in the loss."""
    reward_coef: NonNegative = 0.0
    """Weight of the per-token KL subtracted from the reward (start value when adaptive)."""
    kind: KlKind = "k3"
    """Estimator: k1 = log ratio, k2 = half its square, k3 = low variance, abs = |log ratio|; a trailing + takes the
    gradient of k2, the unbiased one (it matters in the loss only)."""
    target: Positive | None = None
    """With a target the reward coefficient adapts to it (Ziegler et al. 2019); null: fixed."""
    horizon: Positive = 10_000
    """Rollouts over which the adaptive controller moves by its full error."""

    @property
    def needs_reference(self) -> bool:
        return self.loss_coef > 0 or self.reward_coef > 0


class OverlongConfig(Frozen):
    """Overlong Reward Shaping (DAPO section 3.4)."""

    soft_punishment: bool = False
    """Add the soft overlong penalty to the reward. Off in the recipe."""
    buffer_tokens: Annotated[int, Field(gt=0)] = 512
    """Length of the slope before the limit: the penalty falls linearly from 0 to -factor over these tokens."""
    factor: NonNegative = 1.0
    """The penalty is never below -factor."""
    filter_truncated: bool = False
    """Mask truncated responses out of the loss and its denominator (overlong filtering)."""


class SamplingFilterConfig(Frozen):
    """Dynamic Sampling (DAPO section 3.2): only groups with 0 < #correct < G are trained on."""

    enabled: bool = True
    metric: Literal["accuracy", "reward"] = "accuracy"
    """What a group is judged by: the boolean accuracy of its answers (the paper's), or, for graders without a boolean,
    whether its rewards differ at all."""
    compat: Literal["none", "verl"] = "none"
    """`verl` samples as verl does: fixed rounds, surplus dropped, an error after `max_rounds`. Its filter, too, with
    `metric: reward`: what verl calls `acc` is the weighted reward. A failed check, there a 0, stays no verdict here."""
    max_rounds: Annotated[int, Field(ge=1)] = 4
    """Generation rounds a step may use before starvation handling begins."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Surplus kept groups are carried over while at most this many policy versions old (a step is one version)."""
    safety: NonNegative = 1.0
    """A round is sized to fill the step at the measured keep rate with so many standard deviations to spare
    (1.0: five rounds in six). The surplus waits for the next step."""
    largest_round: Annotated[float, Field(ge=1)] = 8.0
    """No round has more than this many times `prompts_per_step` prompts."""
    revisit: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A prompt whose groups all agreed the last z times it was sampled is sampled again with probability
    revisit ** min(z, 4) (selective rollouts, after arXiv 2506.02177): never less than 24 % by default. 1.0: always,
    as in the paper. Saves about a third of generation from the second epoch on; nothing in the first."""
    min_prompts_share: Fraction = 0.25
    """Starvation: a step of at least this share of `prompts_per_step` is trained with exact denominators."""
    patience_rounds: Annotated[int, Field(ge=0)] = 8
    """Further rounds after `max_rounds` to reach that share, before the run stops with a checkpoint."""


class CorrectionConfig(Frozen):
    """Engine against trainer log-probabilities (truncated importance sampling). The gap is always measured."""

    kind: Literal["off", "truncate", "mask"] = "off"
    """`truncate` caps the weight, `mask` drops what lies outside the bounds."""
    level: Literal["token", "sequence"] = "token"
    high: Positive = 2.0
    """Upper bound of the weight."""
    low: NonNegative = 0.5
    """Lower bound (mask only)."""


class AlarmConfig(Frozen):
    """Thresholds of alarms. Alarms never stop a run."""

    min_entropy: NonNegative = 0.02
    """Nats per token; below it: entropy collapse."""
    max_gap: Positive = 0.1
    """Mean absolute difference of engine and trainer log-probabilities, nats."""
    max_clipped_probability: Fraction = 0.2
    """Mean probability of tokens clipped from above (the paper's plot stays under 0.2)."""
    window: Annotated[int, Field(ge=2)] = 10
    """Steps over which reward and accuracy trends are compared."""


class AlgorithmConfig(Frozen):
    """What a training step computes."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (R - mean) / std in the group; dr_grpo: without the division; rloo: against the mean of the others."""
    loss: LossConfig = DapoLossConfig()
    aggregation: AggregationName = "token-mean"
    """How token losses become one number; `token-mean` is DAPO's token-level loss (section 3.3)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus. 0 in the recipe: entropy is watched, not rewarded."""
    kl: KlConfig = KlConfig()
    overlong: OverlongConfig = OverlongConfig()
    sampling: SamplingFilterConfig = SamplingFilterConfig()
    correction: CorrectionConfig = CorrectionConfig()
    alarms: AlarmConfig = AlarmConfig()

    @model_validator(mode="after")
    def _gspo_takes_a_mean(self) -> AlgorithmConfig:
        if self.loss.kind == "gspo" and self.aggregation == "token-sum":
            raise ValueError("algorithm.loss.kind=gspo needs a sequence or token mean; token-sum has no meaning for it")
        return self
