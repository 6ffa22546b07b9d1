"""The loss. Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

    logits = beta * (log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x))        loss = -log sigmoid(logits)

Legend: P pairs, y_w the chosen answer, y_l the rejected one. A log-ratio is the policy's log-probability of a whole
answer minus the reference's: sums over its tokens, in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen_logratios: Tensor,  # (P,) log pi(y_w|x) - log pi_ref(y_w|x)
    rejected_logratios: Tensor,  # (P,) log pi(y_l|x) - log pi_ref(y_l|x)
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * (chosen_logratios - rejected_logratios)), for each pair -> (P,).

    `beta` is the price of moving away from the reference. `label_smoothing` is the chance that a label is wrong:
    conservative DPO, Mitchell 2023 (https://ericmitchell.ai/cdpo.pdf), equation 3. The gradient by the chosen answer's
    log-probability is -beta * (sigmoid(-logits) - label_smoothing), and its negative for the rejected one.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


# What is logged of every pair, by TRL's names.
METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


def preference_metrics(
    losses: Tensor, policy_logps: Tensor, chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float
) -> Tensor:
    """losses (P,), policy_logps (P, 2) of chosen and rejected, log-ratios (P,) -> (P, M), a column for each of METRICS,
    without gradient.

    An answer's reward is beta times its log-ratio (section 4 of the paper), in nats. Where both rewards are equal, as
    all are before the first step, the pair counts as wrong: accuracies start at 0, not at 0.5.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    accuracies, margins = (chosen > rejected).to(chosen.dtype), chosen - rejected
    return torch.stack([losses, chosen, rejected, accuracies, margins, *policy_logps.unbind(1)], dim=1).detach()
