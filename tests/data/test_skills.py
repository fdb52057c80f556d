"""The household robot: what can be done when, and that plans do what they are for."""

import pytest

from raysys.data.datasets import DataError
from raysys.data.skills import OBJECTS, PLACES, Errand, Skill, Skills, World, pool, shown_errands


def after(*texts, places=True):
    world = Errand("", ()).start() if places else World(places=False)
    for text in texts:
        world.do(Skill.of(text))
    return world


@pytest.mark.parametrize(
    ("done", "skill", "reason"),
    [
        ((), "pick up the apple", "the apple is not here"),
        (("find the apple", "pick up the apple"), "pick up the banana", "the gripper holds the apple"),
        (("find the milk",), "pick up the milk", "the fridge is closed"),
        (("find the milk", "open the fridge"), "open the fridge", "the fridge is open"),
        (("find the milk",), "close the fridge", "the fridge is closed"),
        ((), "open the fridge", "the robot is not at the fridge"),
        (("find the apple", "pick up the apple", "go to the fridge"), "open the fridge", "the gripper holds the apple"),
        (("find the apple", "pick up the apple", "go to the fridge"), "put down the apple", "the fridge is closed"),
        (("find the apple", "pick up the apple"), "put down the banana", "does not hold the banana"),
        (("find the apple", "pick up the apple"), "find the apple", "the gripper holds the apple"),
        ((), "find the moon", "there is no moon"),
        ((), "bring it to you", "the gripper holds nothing"),
        (("go to the table",), "go to the table", "the robot is at the table"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason_and_changes_nothing(done, skill, reason):
    world, before = after(*done), after(*done)
    assert reason in world.refusal(Skill.of(skill))
    with pytest.raises(ValueError, match=reason):
        world.do(Skill.of(skill))
    assert world == before


def test_every_plan_can_be_done_and_meets_its_goals_and_nothing_is_met_before():
    errands = Skills(train=2000, test=600).errands("test")
    assert len({len(errand.plan()) for errand in errands}) > 4
    for errand in errands:
        world = errand.start()
        assert not errand.met(world)
        for text in errand.plan():
            assert text in pool()
            world.do(Skill.of(text))
        assert errand.met(world)
        assert world.finished


def test_instructions_name_neither_their_objects_nor_their_places():
    for thing, (_, words) in OBJECTS.items():
        assert not any(part in said.split() for part in thing.split() for said in words), thing
    for place, ways in PLACES.items():
        assert not any(place in way.split() for way in ways), place


def test_withheld_objects_occur_in_no_training_query_or_skill():
    task = Skills()
    made = task.generate()
    hidden = task.things()[1]
    assert len(hidden) == 2
    words = [said for thing in hidden for said in OBJECTS[thing][1]]
    assert not any(word in text for text in made.train.texts for word in words)
    assert made.unseen.sum() == 6
    assert not made.unseen[list(made.train.answer)].any()
    trained = {errand.text for errand in task.errands("train")}
    assert trained.isdisjoint(errand.text for errand in task.errands("test"))


def test_all_of_saycans_plans_can_be_done_and_only_their_own_effects_meet_them(shared_data):
    file = shared_data / "saycan" / "saycan_plan_v0_l.tsv"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    errands = shown_errands(file)
    assert len(errands) == 99
    for errand in errands:
        assert errand.met(after(*errand.plan(), places=False))
        if len(errand.plan()) > 2:
            assert not errand.met(after(*errand.plan()[:1], places=False))


@pytest.mark.parametrize(
    ("steps", "message"), [("1. fly home", "got 'fly home'"), ("1. put down the tea", "does not hold the tea")]
)
def test_plans_that_are_none_are_refused(tmp_path, steps, message):
    (tmp_path / "plans.tsv").write_text(f"INPUT\tOUTPUT\nDo\t{steps}\n")
    with pytest.raises(DataError, match=rf"line 2: .*{message}"):
        shown_errands(tmp_path / "plans.tsv")
