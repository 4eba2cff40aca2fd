"""Progress within an epoch."""

import pytest
import torch

from pwm_fast.parallel import Ranks
from pwm_fast.run.interrupt import Interrupted
from pwm_fast.run.progress import EpochProgress
from tests.helpers import Pair


def test_goes_on_where_it_was_stopped() -> None:
    progress = EpochProgress()
    done = []
    calls = 0

    def stop_before_third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        for i in progress.remaining("updates", 4, stop_before_third):
            done.append(i)
            progress.add({"loss": torch.tensor(float(i))})
    restored = EpochProgress()
    restored.load_state_dict(progress.state_dict())
    for i in restored.remaining("updates", 4, lambda: None):
        done.append(i)
        restored.add({"loss": torch.tensor(float(i))})
    assert done == [0, 1, 2, 3]
    assert restored.means() == {"loss": torch.tensor(1.5)}
    assert list(restored.remaining("updates", 4, lambda: None)) == []
    assert list(restored.remaining("others", 1, lambda: None)) == [0]


def test_episodes_are_averaged_where_they_end() -> None:
    progress = EpochProgress()
    for mask, returns in (([True, False], [4.0, 9.0]), ([True, True], [5.0, 6.0])):
        progress.add_episodes(
            {
                "mask": torch.tensor(mask),
                "return": torch.tensor(returns),
                "length": torch.tensor([2, 3]),
            }
        )
    means = progress.means()
    assert means["train_reward"] == 5.0
    assert means["train_episode_length"] == pytest.approx(7 / 3)


def test_steps_are_averaged_also_across_a_stop() -> None:
    progress = EpochProgress()
    progress.add_step("share", torch.tensor(1.0))
    restored = EpochProgress()
    restored.load_state_dict(progress.state_dict())
    for value in (0.0, 0.5):
        restored.add_step("share", torch.tensor(value))
    assert restored.means() == {"share": torch.tensor(0.5)}


def test_no_episode_is_not_a_number() -> None:
    progress = EpochProgress()
    none = {"mask": torch.tensor([False]), "return": torch.ones(1), "length": torch.ones(1)}
    progress.add_episodes(none)
    assert progress.means()["train_reward"].isnan()


def test_totals_are_sums_also_across_a_stop() -> None:
    progress = EpochProgress()
    progress.add_total("diverged", torch.tensor(2))
    progress.add_total("diverged", torch.tensor(0))
    restored = EpochProgress()
    restored.load_state_dict(progress.state_dict())
    restored.add_total("diverged", torch.tensor(3))
    assert restored.means()["diverged"] == 5


def test_the_epoch_of_two_ranks() -> None:
    def on(ranks: Ranks) -> EpochProgress:
        progress = EpochProgress()
        for i in progress.remaining("updates", 2, lambda: None):
            progress.add({"loss": torch.tensor(float(i + ranks.rank))})
            progress.add_total("diverged", torch.tensor(1 + ranks.rank))
        if ranks.rank == 1:  # where one episode ended, and on the other rank none
            mask, values = torch.tensor([True]), torch.tensor([3.0])
            progress.add_episodes({"mask": mask, "return": values, "length": values})
        else:
            mask, values = torch.tensor([False]), torch.tensor([9.0])
            progress.add_episodes({"mask": mask, "return": values, "length": values})
        restored = EpochProgress()
        restored.load_state_dict(progress.state_dict())
        return restored.of_all(ranks)

    for whole in Pair.run(on):
        means = whole.means()
        assert (means["loss"], means["diverged"], means["train_reward"]) == (1.0, 6, 3.0)
        assert whole.ended() == {"episodes": 1, "diverged": 6}
        assert list(whole.remaining("updates", 3, lambda: None)) == [2]
        bare = whole.without_sums()
        assert bare.means() == {} and list(bare.remaining("updates", 3, lambda: None)) == []
