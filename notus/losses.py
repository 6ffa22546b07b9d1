"""The loss. Direct Preference Optimization, Rafailov et al. 2023 (arXiv:2305.18290), equation 7.

Legend: P pairs. Log-probabilities are sums over the tokens of an answer, in nats.
"""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,  # (P,) log pi(y_w | x)
    policy_rejected_logps: Tensor,  # (P,) log pi(y_l | x)
    reference_chosen_logps: Tensor,  # (P,) log pi_ref(y_w | x)
    reference_rejected_logps: Tensor,  # (P,) log pi_ref(y_l | x)
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected)), for each pair -> (P,).

    `beta` is the price of moving away from the reference. `label_smoothing` is the chance that a label is wrong:
    conservative DPO, Mitchell 2023 (https://ericmitchell.ai/cdpo.pdf), equation 3. The gradient by
    policy_chosen_logps is -beta * (sigmoid(-logits) - label_smoothing), and its negative by policy_rejected_logps.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def preference_metrics(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> dict[str, Tensor]:
    """What the loss implies, for each pair, by TRL's names: each value is (P,), without gradient.

    An answer's reward is beta * (log pi - log pi_ref), section 4 of the paper. Where both rewards are equal, as they
    all are before the first step, the pair counts as wrong: accuracies start at 0, not at 0.5.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy_chosen_logps.detach(),
        "logps/rejected": policy_rejected_logps.detach(),
    }
