"""The datasets that `rlalign_envs` carries: small, whole, as their checksums say, and found by name."""

import hashlib
import json
from pathlib import Path

import pytest

from rlalign.agents.datasets import DatasetError, load_dataset, rlalign_score

DATA = Path(__file__).parents[2] / "envs" / "rlalign_envs" / "data"
FACTS = json.loads((DATA / "datasets.json").read_text())


def test_all_are_listed_and_small():
    assert {path.stem for path in DATA.glob("*.npz")} == set(FACTS)
    wanted = {"cartpole_random", "cartpole_mixed", "cartpole_expert", "pendulum_random", "pendulum_medium"}
    assert wanted | {"pendulum_mixed", "four_room", "lock_5"} == set(FACTS)
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000


@pytest.mark.parametrize("name", FACTS)
def test_what_is_shipped_is_what_was_made(name):
    fact, file = FACTS[name], DATA / f"{name}.npz"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == fact["sha256"]
    found = load_dataset(f"rlalign_envs:{name}")
    returns = found.transitions.returns()
    assert found.source == f"rlalign_envs:{name}"
    assert found.transitions.fingerprint() == fact["fingerprint"]
    assert (len(returns), len(found.transitions)) == (fact["episodes"], fact["transitions"])
    assert found.reference.env_id == fact["env_id"]
    assert found.reference.ref_min_score == fact["ref_min_score"]
    assert found.reference.ref_max_score == fact["ref_max_score"]
    assert fact["ref_min_score"] < fact["ref_max_score"]
    ended = found.transitions.terminated | found.transitions.truncated
    assert int(ended.sum()) == len(returns)


def test_better_players_have_better_scores():
    def score(name):
        found = load_dataset(f"rlalign_envs:{name}")
        return float(rlalign_score(found.transitions.returns(), found.reference).mean())

    assert abs(score("cartpole_random")) < 5
    assert score("cartpole_random") < score("cartpole_mixed") < score("cartpole_expert") == 100
    assert abs(score("pendulum_random")) < 5
    assert score("pendulum_random") < score("pendulum_mixed") < score("pendulum_medium") < 60


def test_names_that_are_none():
    with pytest.raises(DatasetError, match="carries no such dataset; it has cartpole_expert, cartpole_mixed"):
        load_dataset("rlalign_envs:cartpole")
    with pytest.raises(DatasetError, match="`no_such_package` is not installed"):
        load_dataset("no_such_package:set")
    with pytest.raises(DatasetError, match="it has none"):
        load_dataset("json:set")
