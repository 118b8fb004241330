"""Settings of the offline agents: the papers' constants, and what is refused."""

import pytest
from pydantic import TypeAdapter, ValidationError

from rlalign.agents.config_offline import BCConfig, IQLConfig, ODICEConfig, TD3BCConfig


def test_defaults_are_the_papers_where_size_does_not_matter():
    dice, iql, td3 = ODICEConfig(), IQLConfig(), TD3BCConfig()
    assert (dice.conjugate_weight, dice.backward_weight, dice.max_weight) == (0.6, 1.0, 100.0)
    assert (dice.gradient, dice.divergence, dice.weight_rule) == ("orthogonal", "chi_square", "relu")
    assert (dice.optim.learning_rate, dice.optim.weight_decay, dice.critic_optim.weight_decay) == (2e-4, 1e-4, 0.0)
    assert dice.critic_network.layer_norm
    assert not dice.network.layer_norm
    assert (iql.expectile, iql.temperature, iql.optim.learning_rate) == (0.7, 3.0, 3e-4)
    assert (td3.alpha, td3.policy_noise, td3.noise_clip, td3.policy_delay) == (2.5, 0.2, 0.5, 2)
    for cfg in (dice, iql, td3):
        assert (cfg.gamma, cfg.batch_size, cfg.target_tau) == (0.99, 256, 0.005)
        assert cfg.optim.max_grad_norm is None


@pytest.mark.parametrize(
    ("cls", "data", "sentence"),
    [
        (ODICEConfig, {"conjugate_weight": 1.0}, "less than 1"),
        (ODICEConfig, {"backward_weight": -0.1}, "greater than or equal to 0"),
        (ODICEConfig, {"gradient": "half"}, "'orthogonal', 'true' or 'semi'"),
        (IQLConfig, {"expectile": 0.0}, "greater than 0"),
        (IQLConfig, {"gamma": 1.0}, "less than 1"),
        (BCConfig, {"gamma": 0.9}, "Unexpected keyword argument"),
        (BCConfig, {"total_updates": 0}, "greater than or equal to 1"),
    ],
)
def test_values_without_meaning_are_refused(cls, data, sentence):
    with pytest.raises(ValidationError, match=sentence):
        TypeAdapter(cls).validate_python(data)
