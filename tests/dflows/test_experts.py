"""Which experts leave out what is scored, and where."""

import threading

import pytest
import torch

from dflows.experts import Expert, leave_one_out


class Uniform(Expert):
    def num_terms(self, levels):
        return 1

    def forward(self, y, levels, dimensions=None, *, num_terms):
        return torch.zeros(*y.shape, self.num_classes, num_terms)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("counted", [None, False, True])
def test_what_was_counted_is_left_out_within_the_context(training, counted):
    expert = Uniform(3).train(training)
    assert not expert.leaves_one_out
    with leave_one_out(counted):
        assert expert.leaves_one_out == (training if counted is None else counted)
    assert not expert.leaves_one_out


def test_the_innermost_context_holds():
    expert = Uniform(3)
    with leave_one_out():
        with leave_one_out(counted=False):
            assert not expert.leaves_one_out
        assert expert.leaves_one_out


def test_an_error_ends_the_context():
    expert = Uniform(3)
    with pytest.raises(KeyError), leave_one_out():
        raise KeyError
    assert not expert.leaves_one_out


def test_other_threads_are_left_alone():
    expert, seen = Uniform(3), []
    with leave_one_out():
        thread = threading.Thread(target=lambda: seen.append(expert.leaves_one_out))
        thread.start()
        thread.join()
    assert seen == [False]
