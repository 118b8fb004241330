"""Winners and losers of one prompt: labels by hand, who may be paired, even use, and a function of (seed, step)."""

from collections import Counter

import pytest
import torch

from rlalign.diffusion.pairs import Pairs, labels_of

#           prompt 0: rows 0-4     1: only winners   2: rows 7-9
LABELS = torch.tensor([1, 1, -1, 0, -1, 1, 1, -1, 1, -1])
PROMPTS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])


def test_labels_by_threshold_band_and_unknown():
    outcome = torch.tensor([0.9, 0.5, 0.49, 0.1, float("nan")])
    assert labels_of(outcome, threshold=0.5).tolist() == [1, 1, -1, -1, 0]
    # |.5 - .5| and |.49 - .5| are below .05, and so is nothing else
    assert labels_of(outcome, threshold=0.5, band=0.05).tolist() == [1, 0, 0, -1, 0]


def test_the_band_leaves_out_what_is_nearer_than_its_width_and_nothing_at_it():
    assert labels_of(torch.tensor([0.25, 0.75]), threshold=0.5, band=0.25).tolist() == [-1, 1]


def test_a_pair_is_a_winner_and_a_loser_of_the_same_prompt():
    pairs = Pairs(LABELS, PROMPTS, seed=0).draw(0, 40)
    win, lose = pairs.T
    assert (LABELS[win] == 1).all()
    assert (LABELS[lose] == -1).all()
    assert torch.equal(PROMPTS[win], PROMPTS[lose])


def test_prompts_whose_samples_all_tie_are_counted_and_give_no_pair():
    pairs = Pairs(LABELS, PROMPTS, seed=0)
    assert (len(pairs), pairs.without) == (2, 1)
    assert not (PROMPTS[pairs.draw(0, 40)] == 1).any()


def test_prompts_and_within_them_winners_and_losers_are_used_evenly():
    pairs = Pairs(LABELS, PROMPTS, seed=3).draw(0, 8)  # 4 laps over 2 prompts
    assert Counter(PROMPTS[pairs[:, 0]].tolist()) == {0: 4, 2: 4}
    assert Counter(pairs[:, 0].tolist()) == {0: 2, 1: 2, 8: 4}
    assert Counter(pairs[:, 1].tolist()) == {2: 2, 4: 2, 7: 2, 9: 2}


def test_a_step_has_the_same_pairs_whatever_was_drawn_before():
    one = Pairs(LABELS, PROMPTS, seed=0)
    whole = torch.cat([one.draw(step, 3) for step in range(6)])
    assert torch.equal(Pairs(LABELS, PROMPTS, seed=0).draw(4, 3), whole[12:15])
    assert torch.equal(one.draw(1, 3), whole[3:6])  # and backwards
    assert not torch.equal(Pairs(LABELS, PROMPTS, seed=1).draw(0, 18), whole)


def test_without_both_classes_there_is_nothing_to_draw():
    pairs = Pairs(torch.tensor([1, -1]), torch.tensor([0, 1]), seed=0)
    assert (len(pairs), pairs.without) == (0, 2)
    with pytest.raises(ValueError, match="no prompt has both"):
        pairs.draw(0, 1)
