"""The losses of the DPO family. `python -m notus.losses` computes an example of each.

Six numbers of a pair go in and one comes out. Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290),
equation 7:

    loss = -log sigmoid( beta * log pi(y_w|x)/pi_ref(y_w|x)  -  beta * log pi(y_l|x)/pi_ref(y_l|x) )

The others change what is compared (whole answers or the average token, with or without a reference), or what is asked
of the difference. Every function below has the same arguments. One that it does not use begins with an underscore.

    policy      (P, 2)  log pi(y|x) in nats: the sum over the tokens of an answer, its EOS included
    reference   (P, 2)  log pi_ref(y|x), the same
    tokens      (P, 2)  |y|: how many tokens those sums have, at least 1
    beta                see the table LOSSES for its usual range, which differs from loss to loss
    -> loss     (P,)

Legend: P pairs. Column 0 is the chosen answer y_w, column 1 the rejected answer y_l.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(policy: Tensor, reference: Tensor, _tokens: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(logits). Rafailov et al. 2023, equation 7.

    `label_smoothing` is the chance that a label is wrong: conservative DPO, Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf), equation 3. The code of the DPO paper and open-instruct apply it to this loss.
    TRL's `sigmoid` accepts the setting and ignores it. Here it is applied, and the losses that have none refuse it.
    """
    chosen_logratios, rejected_logratios = (policy - reference).unbind(1)  # (P,) log pi(y|x)/pi_ref(y|x)
    logits = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def dpo_norm(policy: Tensor, reference: Tensor, tokens: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO of the average token, so that a long answer does not win by its length. Tulu 3, Lambert et al. 2024
    (arXiv:2411.15124), section 5, and OLMo 2 (arXiv:2501.00656), with beta 5. TRL calls it `sigmoid_norm`."""
    return dpo(policy / tokens, reference / tokens, tokens, beta, label_smoothing)


def ipo(policy: Tensor, reference: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """(difference of the log-ratios - 1 / (2 beta))^2. Azar et al. 2023 (arXiv:2310.12036), equation 17.

    It pulls the difference to a fixed distance, where DPO always wants more. The equation has the log-ratios of whole
    answers, and so has the code of the DPO paper. TRL takes the average token since the authors of IPO said that their
    results do (TRL pull request 1265). The average is used here too: the distance 1 / (2 beta) is a constant, and
    would otherwise mean less for a long answer.
    """
    chosen, rejected = ((policy - reference) / tokens).unbind(1)  # (P,) log-ratios a token
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(policy: Tensor, _reference: Tensor, tokens: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """-log sigmoid(difference of the rewards - margin). SimPO, Meng et al. 2024 (arXiv:2405.14734), equation 6.

    There is no reference: a reward is beta times the log-probability of the average token (equation 4). `margin` is
    the paper's gamma, in units of the reward, as in TRL. The authors' code and open-instruct ask for gamma / beta.
    """
    chosen_rewards, rejected_rewards = (beta * policy / tokens).unbind(1)
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def apo_zero(policy: Tensor, reference: Tensor, _tokens: Tensor, beta: float) -> Tensor:
    """(1 - sigmoid(reward of y_w)) + sigmoid(reward of y_l). APO, D'Oosterlinck et al. 2024 (arXiv:2408.06266),
    equation 7. The chosen answer shall rise and the rejected one fall, each for itself: in DPO both may fall."""
    chosen_rewards, rejected_rewards = (beta * (policy - reference)).unbind(1)
    return torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)  # 1 - sigmoid(r) = sigmoid(-r), exactly


def nll(policy: Tensor, tokens: Tensor) -> Tensor:
    """-log pi(y_w|x) / |y_w|, the loss of SFT on the chosen answer, for `nll_weight`. Iterative RPO, Pang et al. 2024
    (arXiv:2404.19733), equation 1, adds it to DPO with weight 1.

    Every pair counts the same, as in the paper. TRL's `sft` loss averages over the tokens of a micro-batch, so there a
    long answer counts more, and the result depends on which pairs meet.
    """
    return -policy[:, 0] / tokens[:, 0]


class Member(NamedTuple):
    """What to know of a loss besides its formula."""

    function: Callable[..., Tensor]
    title: str
    paper: str
    url: str
    formula: str  # with D = log pi(y|x)/pi_ref(y|x), n = |y|, s = sigmoid
    betas: str  # the usual range
    when: str
    options: tuple[str, ...] = ()  # settings besides beta and nll_weight
    reference: bool = True
    per_token: bool = False  # whether it compares the average token
    # Law 1: (beta, label_smoothing) -> the loss where the policy is the reference, and the size of its gradient by both
    # log-probs, or by their averages: - for the chosen answer, + for the rejected one. None without a reference.
    start: Callable[[float, float], tuple[float, float]] | None = None


LOSSES = {
    "dpo": Member(
        dpo, "Direct Preference Optimization", "Rafailov et al. 2023", "https://arxiv.org/abs/2305.18290",
        "-log s(beta (D_w - D_l))", "0.01 to 0.5", "first; Zephyr and Notus. label_smoothing if labels are noisy",
        ("label_smoothing",), start=lambda beta, smoothing: (math.log(2), beta * (0.5 - smoothing)),
    ),
    "dpo_norm": Member(
        dpo_norm, "length-normalized Direct Preference Optimization", "Lambert et al. 2024",
        "https://arxiv.org/abs/2411.15124", "-log s(beta (D_w/n_w - D_l/n_l))", "2 to 10",
        "answers grow too long under dpo; Tulu 3 and OLMo 2, with beta 5", ("label_smoothing",), per_token=True,
        start=lambda beta, smoothing: (math.log(2), beta * (0.5 - smoothing)),
    ),
    "ipo": Member(
        ipo, "Identity Preference Optimization", "Azar et al. 2023", "https://arxiv.org/abs/2310.12036",
        "(D_w/n_w - D_l/n_l - 1/(2 beta))^2", "0.01 to 1", "few pairs or many epochs: it stops at a distance",
        per_token=True, start=lambda beta, _: (1 / (4 * beta**2), 1 / beta),
    ),
    "simpo": Member(
        simpo, "Simple Preference Optimization", "Meng et al. 2024", "https://arxiv.org/abs/2405.14734",
        "-log s(beta (log pi_w/n_w - log pi_l/n_l) - margin)", "2 to 10",
        "no reference is wanted; margin 0.3 to 1.6, and a low learning rate", ("margin",), reference=False,
        per_token=True,
    ),
    "apo_zero": Member(
        apo_zero, "Anchored Preference Optimization", "D'Oosterlinck et al. 2024", "https://arxiv.org/abs/2408.06266",
        "s(-beta D_w) + s(beta D_l)", "0.05 to 0.5",
        "chosen answers are better than what the model writes; SmolLM3, with beta 0.05",
        start=lambda beta, _: (1.0, beta / 4),
    ),
}  # fmt: skip

# What is logged of every pair, by TRL's names.
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class PreferenceLoss:
    """One of LOSSES with its settings, plus `nll_weight` times the loss of SFT on the chosen answer. ValueError if the
    loss is unknown, a value is out of range, or a setting would be ignored."""

    name: str
    beta: float
    label_smoothing: float = 0.0
    margin: float = 0.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"there is no loss {self.name!r}; there are {', '.join(LOSSES)}")
        within = {
            "beta": 0 < self.beta < math.inf, "label_smoothing": 0 <= self.label_smoothing < 0.5,
            "margin": 0 <= self.margin < math.inf, "nll_weight": 0 <= self.nll_weight < math.inf,
        }  # fmt: skip
        for name, good in within.items():
            if not good:
                raise ValueError(f"{name} {getattr(self, name)!r} is out of range")
        for name in ("label_smoothing", "margin"):
            if getattr(self, name) and name not in self.member.options:
                raise ValueError(f"{self.name} has no {name}")

    @property
    def member(self) -> Member:
        return LOSSES[self.name]

    def __call__(self, policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """policy, reference, tokens (P, 2) -> (P,)."""
        options = {name: getattr(self, name) for name in self.member.options}
        losses = self.member.function(policy, reference, tokens, self.beta, **options)
        return losses + self.nll_weight * nll(policy, tokens) if self.nll_weight else losses

    def rewards(self, policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """(P, 2), in nats: beta times the log-ratio of a whole answer (section 4 of the DPO paper), or without a
        reference beta times the log-probability of the average token, as in TRL.

        The log-ratio is not divided by the tokens for `dpo_norm` and `ipo` either. So runs with different losses log
        one quantity. open-instruct divides it.
        """
        return self.beta * (policy - reference if self.member.reference else policy / tokens)

    def metrics(self, losses: Tensor, policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """losses (P,), the others (P, 2) -> (P, M), a column for each of METRICS, without gradient.

        Where both rewards are equal, as all are before the first step, the pair counts as wrong: accuracies start at 0,
        not at 0.5.
        """
        chosen, rejected = self.rewards(policy, reference, tokens).unbind(1)
        accuracies, margins = (chosen > rejected).to(chosen.dtype), chosen - rejected
        return torch.stack([losses, chosen, rejected, accuracies, margins, *policy.unbind(1)], dim=1).detach()

    def reward(self, model: str, base: str) -> str:
        """How `rewards` makes the reward of an answer, in words."""
        return f"beta * log({model} / {base})" if self.member.reference else f"beta * log({model}) / tokens"

    @property
    def start(self) -> float | None:
        """The loss where the policy is the reference. None if that depends on the pair."""
        known = self.member.start and self.member.start(self.beta, self.label_smoothing)
        return known[0] if known and not self.nll_weight else None

    def check_start(self, reference: Tensor, tokens: Tensor) -> None:
        """Law 1: where the policy is the reference, loss and gradient are those of the table, for every pair.
        ArithmeticError if not. reference, tokens: (P, 2)."""
        if not self.member.start:
            return
        reference = reference.detach().double()
        policy = reference.clone().requires_grad_()
        with torch.enable_grad():
            losses = self(policy, reference, tokens)
            (gradient,) = torch.autograd.grad(losses.sum(), policy)
        value, slope = self.member.start(self.beta, self.label_smoothing)
        known = value + self.nll_weight * nll(reference, tokens)
        by_policy = torch.tensor([-slope, slope], dtype=torch.float64).expand_as(reference)
        by_policy = by_policy / tokens if self.member.per_token else by_policy.clone()
        by_policy[:, 0] -= self.nll_weight / tokens[:, 0]
        for what, found, expected in (("loss", losses, known), ("gradient", gradient, by_policy)):
            wrong = ~torch.isclose(found, expected, rtol=1e-9)
            if wrong.any():
                raise ArithmeticError(
                    f"where the policy is the reference, the {what} of {self} must be {expected[wrong][0]:.6g}, and is "
                    f"{found[wrong][0]:.6g}"
                )

    def __str__(self) -> str:
        more = {"label smoothing": self.label_smoothing, "margin": self.margin, "NLL weight": self.nll_weight}
        return ", ".join([self.name, f"beta {self.beta:g}", *(f"{k} {v:g}" for k, v in more.items() if v)])


# --- python -m notus.losses ------------------------------------------------------------------------------------------

# The first pair is that of docs/dpo.md. In the second one the policy has moved the wrong way.
POLICY = [[-30.935, -26.229], [-61.0, -58.0]]
REFERENCE = [[-31.433, -25.656], [-55.0, -60.0]]
TOKENS = [[5, 4], [20, 10]]
EXAMPLES = (
    PreferenceLoss("dpo", 0.1), PreferenceLoss("dpo", 0.1, label_smoothing=0.1), PreferenceLoss("dpo_norm", 5.0),
    PreferenceLoss("ipo", 0.5), PreferenceLoss("simpo", 2.5, margin=1.0), PreferenceLoss("apo_zero", 0.1),
)  # fmt: skip


def equation_7(beta: float = 0.1) -> dict[str, list[float]]:
    """Every quantity of equation 7 by its name, for the two pairs above."""
    policy, reference = (torch.tensor(numbers, dtype=torch.float64) for numbers in (POLICY, REFERENCE))
    policy.requires_grad_()
    loss = dpo(policy, reference, torch.tensor(TOKENS), beta)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    logratios, rewards = (policy - reference).detach(), beta * (policy - reference).detach()
    margin = rewards[:, 0] - rewards[:, 1]
    rows = {
        "log pi(y_w|x)": policy[:, 0], "log pi(y_l|x)": policy[:, 1],
        "log pi_ref(y_w|x)": reference[:, 0], "log pi_ref(y_l|x)": reference[:, 1],
        "log pi(y_w|x)/pi_ref(y_w|x)": logratios[:, 0], "log pi(y_l|x)/pi_ref(y_l|x)": logratios[:, 1],
        "reward r(y_w) = beta * log-ratio": rewards[:, 0], "reward r(y_l)": rewards[:, 1],
        "margin r(y_w) - r(y_l)": margin, "p(y_w > y_l) = sigmoid(margin)": torch.sigmoid(margin),
        "loss = -log sigmoid(margin)": loss, "weight of the pair = sigmoid(-margin)": torch.sigmoid(-margin),
        "d loss / d log pi(y_w|x) = -beta * weight": gradient[:, 0], "d loss / d log pi(y_l|x)": gradient[:, 1],
    }  # fmt: skip
    return {name: values.tolist() for name, values in rows.items()}


def describe() -> str:
    """The example and the table, as text."""
    policy, reference = torch.tensor(POLICY), torch.tensor(REFERENCE)
    lines = ["Equation 7 for two pairs, beta = 0.1 (log-probs, log-ratios and rewards in nats):", ""]
    lines += [f"{name:45}{a:10.4f}{b:10.4f}" for name, (a, b) in equation_7().items()]
    lines += ["", "The family on the same pairs:", "", f"{'loss':35}{'pair 1':>10}{'pair 2':>10}   policy = reference"]
    for each in EXAMPLES:
        a, b = each(policy, reference, torch.tensor(TOKENS)).tolist()
        start = "depends on the pair" if each.start is None else f"{each.start:.4f}"
        lines.append(f"{each!s:35}{a:10.4f}{b:10.4f}   {start}")
    return "\n".join([*lines, "", "D = log pi(y|x)/pi_ref(y|x), n = |y| in tokens, s = sigmoid", "", table()])


def table() -> str:
    """LOSSES in Markdown, as the README has it."""
    lines = ["| loss | formula | reference? | beta | when to choose it |", "|---|---|---|---|---|"]
    for name, one in LOSSES.items():
        reference = "yes" if one.reference else "no"
        lines.append(f"| [`{name}`]({one.url}) | `{one.formula}` | {reference} | {one.betas} | {one.when} |")
    return "\n".join(lines)


def curves(loss: PreferenceLoss, margins: Tensor, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """margins (N,) -> loss (N,), and its gradient (N,) by log pi(y_w|x), for answers of `tokens` tokens. The margin is
    D_w - D_l in nats, half of it a gain of the chosen answer and half a loss of the rejected one."""
    policy = (margins[:, None] * torch.tensor([0.5, -0.5])).requires_grad_()  # (N, 2)
    losses = loss(policy, torch.zeros_like(policy), torch.full_like(policy, tokens))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient[:, 0]


def draw(output: Path) -> Path:
    """Loss and gradient of EXAMPLES against the margin. The suffix picks the format."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install -e '.[plots]'") from error
    margins = torch.linspace(-150, 150, 601, dtype=torch.float64)
    colors = ("#0072B2", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#000000")  # Okabe & Ito, for the colour-blind
    style: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                  "grid.color": "#E6E9EC", "legend.frameon": False}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True)
        for loss, color in zip(EXAMPLES, colors, strict=True):
            for axes, values in zip(panels, curves(loss, margins), strict=True):
                axes.plot(margins, values, "--" if loss.label_smoothing else "-", color=color, label=str(loss))
        titles = "loss (nats; ipo: squared nats a token)", "gradient by the chosen answer's log-prob"
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, loc="left", fontweight="bold", fontsize=10.5)
            axes.axvline(0, color="#5F6B76", linestyle=":", linewidth=1)
        figure.supxlabel(
            "margin: log-ratio of the chosen answer - of the rejected one, in nats, for answers of 100 tokens "
            "(simpo: of log-probs)",
            fontsize=9.5,
        )
        panels[0].set_ylim(-0.1, 5)
        panels[1].set_ylim(-0.11, 0.022)
        panels[0].legend(fontsize="small")
        figure.savefig(output, dpi=110)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m notus.losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw loss and gradient of each, there")
    arguments = parser.parse_args(argv)
    print(describe())
    try:
        if arguments.plot:
            print(f"\n{draw(arguments.plot)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"notus.losses: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
