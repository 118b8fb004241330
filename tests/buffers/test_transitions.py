"""Transitions: episodes cut into steps without a seam, and batches drawn from them."""

import jaxtyping
import pytest
import torch

from rlalign.buffers.transitions import Episode, TransitionBuffer, Transitions


def episode(first, steps, *, end="terminated", discrete=True):
    """Observations count up from `first`; the reward of a step is its observation."""
    observations = torch.arange(first, first + steps + 1, dtype=torch.float32)[:, None]
    last = torch.arange(steps) == steps - 1
    no = torch.zeros(steps, dtype=torch.bool)
    actions = torch.arange(steps) % 2
    return Episode(
        observations=observations,
        actions=actions if discrete else actions.float()[:, None],
        rewards=observations[:-1, 0].clone(),
        terminated=last if end in ("terminated", "both") else no,
        truncated=last if end in ("truncated", "both") else no,
    )


def three_episodes():
    return Transitions.from_episodes([episode(0, 2), episode(10, 3, end="truncated"), episode(20, 1, end="none")])


def test_steps_of_episodes_are_laid_out_by_hand():
    got = three_episodes()
    assert len(got) == 6
    assert got.observations[:, 0].tolist() == [0, 1, 10, 11, 12, 20]
    assert got.next_observations[:, 0].tolist() == [1, 2, 11, 12, 13, 21]
    assert got.terminated.tolist() == [False, True, False, False, False, False]
    assert got.truncated.tolist() == [False, False, False, False, True, False]
    assert got.episode.tolist() == [0, 0, 1, 1, 1, 2]
    assert got.step.tolist() == [0, 1, 0, 1, 2, 0]
    assert got.actions.tolist() == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("end", ["terminated", "truncated", "both", "none"])
def test_no_next_observation_belongs_to_another_episode(end):
    """Trap: taking the following row's observation bootstraps from the next episode's start."""
    episodes = [episode(100 * n, 1 + n % 3, end=end) for n in range(6)]
    got = Transitions.from_episodes(episodes)
    assert (got.next_observations - got.observations).unique().tolist() == [1.0]
    ends = torch.stack([got.terminated, got.truncated]).any(0)
    assert int(ends.sum()) == (0 if end == "none" else 6)
    assert bool(got.terminated.any()) == (end in ("terminated", "both"))
    assert bool(got.truncated.any()) == (end in ("truncated", "both"))


def test_episodes_come_back_whole():
    episodes = [episode(0, 2), episode(5, 4, end="truncated")]
    back = list(Transitions.from_episodes(episodes).episodes())
    for got, expected in zip(back, episodes, strict=True):
        for name, value in vars(expected).items():
            torch.testing.assert_close(vars(got)[name], value)


def test_a_sample_is_no_set_of_episodes():
    mixed = three_episodes().select(torch.tensor([3, 2, 0]))
    with pytest.raises(ValueError, match=r"has steps \[1, 0\].*whole episodes"):
        list(mixed.select(torch.tensor([0, 1])).episodes())


def test_returns_are_summed_per_episode():
    got = three_episodes()
    assert got.returns().tolist() == [1.0, 33.0, 20.0]
    assert got.select(torch.tensor([5, 0, 1])).returns().tolist() == [1.0, 20.0]  # by id, whatever the order


def test_reward_scale_gives_returns_the_wanted_range():
    # returns 1, 33, 20: range 32
    transitions = three_episodes()
    assert transitions.reward_scale() == pytest.approx(1000 / 32)
    scaled = transitions.with_rewards(transitions.rewards * transitions.reward_scale(spread=64.0))
    assert float(scaled.returns().max() - scaled.returns().min()) == pytest.approx(64.0)
    with pytest.raises(ValueError, match="all 2 episodes have a return of 1.*`rewards: raw`"):
        Transitions.from_episodes([episode(0, 2), episode(0, 2)]).reward_scale()


def test_continuous_actions_keep_their_dimensions():
    got = Transitions.from_episodes([episode(0, 2, discrete=False), episode(3, 1, discrete=False)])
    assert got.actions.shape == (3, 1)
    assert got.actions.dtype == torch.float32


def test_joining_gives_episodes_new_ids():
    joined = Transitions.concatenate([three_episodes(), three_episodes()])
    assert joined.episode.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 5]
    assert joined.returns().tolist() == [1.0, 33.0, 20.0] * 2
    some = three_episodes()
    with_next = Transitions(**vars(some) | {"next_actions": some.actions})
    with pytest.raises(ValueError, match="`next_actions` differs"):
        Transitions.concatenate([some, with_next])
    assert with_next.select(torch.tensor([1])).next_actions.tolist() == [1]


def test_a_fingerprint_knows_every_number_and_their_order():
    one = three_episodes()
    assert one.fingerprint() == three_episodes().fingerprint()
    changed = one.with_rewards(one.rewards + torch.tensor([0, 0, 0, 0, 0, 1e-6]))
    swapped = one.select(torch.tensor([1, 0, 2, 3, 4, 5]))
    assert len({one.fingerprint(), changed.fingerprint(), swapped.fingerprint()}) == 3


# ---------------------------------------------------------------- buffer


def test_every_row_is_drawn_equally_often():
    buffer = TransitionBuffer(three_episodes())
    drawn = buffer.sample(6000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.observations[:, 0].long(), minlength=21)[[0, 1, 10, 11, 12, 20]]
    assert int(counts.sum()) == 6000
    assert counts.float().sub(1000).abs().max().item() < 150  # five standard deviations
    assert (drawn.next_observations - drawn.observations).unique().tolist() == [1.0]  # rows stay together
    again = buffer.sample(6000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.step, again.step)


def test_rows_by_their_place_in_the_episode():
    buffer = TransitionBuffer(three_episodes())
    assert buffer.by_step(0).transitions.observations[:, 0].tolist() == [0, 10, 20]
    assert buffer.by_step(2).transitions.observations[:, 0].tolist() == [12]
    assert set(buffer.by_step(1).sample(50, torch.Generator()).step.tolist()) == {1}
    with pytest.raises(ValueError, match="no episode has a step 3; the longest has 3 steps"):
        buffer.by_step(3)


def test_a_buffer_survives_its_state_dict():
    buffer = TransitionBuffer()
    buffer.add(three_episodes())
    buffer.add(three_episodes())
    assert len(buffer) == 12
    other = TransitionBuffer()
    other.load_state_dict(buffer.state_dict())
    assert other.transitions.fingerprint() == buffer.transitions.fingerprint()
    one, two = (b.sample(8, torch.Generator().manual_seed(1)) for b in (buffer, other))
    assert torch.equal(one.observations, two.observations)
    other.load_state_dict(TransitionBuffer().state_dict())
    assert len(other) == 0


def test_an_empty_buffer_says_so():
    with pytest.raises(ValueError, match="buffer is empty; `add`"):
        TransitionBuffer().sample(1, torch.Generator())
    with pytest.raises(ValueError, match="at least one row, got `size`=0"):
        TransitionBuffer(three_episodes()).sample(0, torch.Generator())


# ---------------------------------------------------------------- faults


@pytest.fixture
def own_checks():
    """Switch jaxtyping off, as it is outside tests, so that the library's own sentences are what fails."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def broken(**changes):
    return Episode(**vars(episode(0, 3)) | changes)


@pytest.mark.usefixtures("own_checks")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"observations": torch.zeros(3, 1)}, "`observations` has 3 rows for 3 rewards; it must have one more"),
        ({"actions": torch.zeros(2)}, "`actions` has 2 rows for 3 rewards"),
        ({"terminated": torch.tensor([False, True, False])}, "`terminated` is true at step 1 of 3, inside the episode"),
        ({"truncated": torch.tensor([True, False, False])}, "`truncated` is true at step 0 of 3, inside the episode"),
    ],
)
def test_an_episode_that_cannot_be_one_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        broken(**changes)


def test_episodes_must_be_alike():
    with pytest.raises(ValueError, match="episode 1 has `actions` of torch.float32 \\[1\\], episode 0 of torch.int64"):
        Transitions.from_episodes([episode(0, 2), episode(0, 2, discrete=False)])
    with pytest.raises(ValueError, match="at least one episode"):
        Transitions.from_episodes([])


def test_transitions_hold_facts():
    facts = vars(three_episodes())
    with pytest.raises(ValueError, match="`rewards` requires grad"):
        Transitions(**facts | {"rewards": facts["rewards"].clone().requires_grad_()})
    with pytest.raises(ValueError, match="`next_observations` is .*must be alike"):
        Transitions(**facts | {"next_observations": facts["next_observations"].double()})
    with pytest.raises(ValueError, match="`nonsense` is no field of Transitions"):
        Transitions.from_state_dict({"nonsense": torch.zeros(1)})
